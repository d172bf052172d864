"""What is known of items beside the tables: rules of bundles and relations between items. Knows nothing of scores."""

from peft_combo.data.knowledge.relations import Relations
from peft_combo.data.knowledge.rule_set import Knowledge, RuleSet
from peft_combo.data.knowledge.rules import Rule, parse_rules

__all__ = ["Knowledge", "Relations", "Rule", "RuleSet", "parse_rules"]
