"""Files of `deploy/`: they parse, name metrics and options that there are, and Prometheus' own checker passes them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from peft_combo import __version__
from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.monitoring import METRICS
from peft_combo.serving.state.identities import VARIABLE as SECRET_VARIABLE

DEPLOY = REPOSITORY / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
_METRIC = re.compile(r"\bpeft_combo[a-z0-9_:]*\b")


def read_all(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def list_expressions() -> list[str]:
    """Every expression of the dashboard, with its variables replaced by what Grafana would put there."""
    told = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    told += [one["expr"] for one in DASHBOARD["annotations"]["list"]]
    return [one.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$route", ".*") for one in told]


def name_metrics(text: str) -> set[str]:
    """Name what a text speaks of as METRICS does: without the suffixes of histograms."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in _METRIC.findall(text)}


def manifests(kind: str) -> list[dict[str, Any]]:
    paths = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [one for path in paths for one in read_all(path) if one["kind"] == kind]


@pytest.mark.parametrize("path", sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]), ids=lambda path: path.name)
def test_a_file_parses(path: Path) -> None:
    assert all(isinstance(one, dict) for one in read_all(path))


def test_alerts_speak_of_metrics_that_there_are_and_say_what_to_do() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        assert name_metrics(rule["expr"]) <= set(METRICS) | recorded, rule["expr"]
        if "alert" in rule:
            assert rule["annotations"]["remedy"]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert set().union(*map(name_metrics, list_expressions())) == set(METRICS)


def test_every_alert_has_a_test() -> None:
    told = yaml.safe_load((DEPLOY / "prometheus" / "alerts.test.yml").read_text())
    tested = {case["alertname"] for test in told["tests"] for case in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in RULES if "alert" in rule}


def test_promtool_passes_rules_tests_configuration_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on this machine (Debian: prometheus)")
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    (tmp_path / "prometheus" / "key").write_text("key")
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(list_expressions())]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    for words in (
        ("check", "config", "prometheus/prometheus.yml"), ("check", "rules", "prometheus/alerts.yml"),
        ("test", "rules", "prometheus/alerts.test.yml"), ("check", "rules", "panels.yml"),
    ):  # fmt: skip
        done = subprocess.run([promtool, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_runs_it_without_rights_and_asks_whether_it_is_ready() -> None:
    (deployment,) = manifests("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live"}
    assert container["ports"][0]["containerPort"] == ServiceConfig.model_fields["port"].default
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert {"/adapters", "/cache", "/tmp"} == mounts
    assert not manifests("Secret"), "a secret is never in a file"


def test_it_scales_by_a_metric_that_is_exposed() -> None:
    (scaler,) = manifests("HorizontalPodAutoscaler")
    names = {one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"] if one["type"] == "Pods"}
    assert names == {"peft_combo_queue_depth"} <= set(METRICS)
    assert scaler["spec"]["scaleTargetRef"]["name"] == manifests("Deployment")[0]["metadata"]["name"]


def test_kustomize_builds_the_manifests() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on this machine")
    done = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = {one["kind"] for one in yaml.safe_load_all(done.stdout)}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "ConfigMap", "PodDisruptionBudget"} <= kinds


def test_arguments_are_options_of_the_command() -> None:
    from typer.main import get_command

    from peft_combo.cli import app

    command: Any = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {name for one in command.params for name in one.opts}
    (deployment,) = manifests("Deployment")
    used = {one.split("=")[0] for one in deployment["spec"]["template"]["spec"]["containers"][0]["args"]}
    start = re.search(r"^CMD (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert start is not None
    used |= {one for one in json.loads(start[1]) if one.startswith("--")}
    assert used <= options
    environment = {one.envvar for one in command.params if isinstance(one.envvar, str)}
    text = (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "kubernetes" / "deployment.yaml").read_text()
    assert set(re.findall(r"PEFT_COMBO_[A-Z]+", text)) <= environment | {SECRET_VARIABLE}


def test_the_image_runs_as_nobody_in_particular_and_only_files_that_it_needs_are_sent() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {name for names in copies for name in names}
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((REPOSITORY / name).exists() for name in sent)


def test_the_bill_of_materials_lists_all_that_is_installed_below_the_package() -> None:
    spec = importlib.util.spec_from_file_location("sbom", REPOSITORY / "tools" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    sbom = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sbom)
    bom = sbom.build_bom("fastapi")
    versions = {one["name"]: one["version"] for one in bom["components"]}
    assert versions["starlette"] == metadata.version("starlette")
    assert "pydantic-core" in versions, "what is required by what is required belongs to it"
    refs = {one["bom-ref"] for one in (*bom["components"], bom["metadata"]["component"])}
    assert {one for entry in bom["dependencies"] for one in (entry["ref"], *entry["dependsOn"])} == refs
    assert bom["specVersion"] == "1.6"


def test_the_kept_bill_of_materials_is_what_the_service_installs_by_the_constraints() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    bom = json.loads((DEPLOY / "sbom.cdx.json").read_text())
    found = {one["name"]: one["version"].partition("+")[0] for one in bom["components"]}
    assert found == {name: pinned.get(name) for name in found}, "pin it, or write the file anew: see docs/serving.md"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [Requirement(line) for line in (*project["dependencies"], *extras["serve"], *extras["postgres"])]
    assert {canonicalize_name(one.name) for one in direct if one.marker is None or one.marker.evaluate()} <= {*found}
    assert all(one.specifier.contains(found[canonicalize_name(one.name)]) for one in direct)
    assert bom["metadata"]["component"]["version"] == __version__
