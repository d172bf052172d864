"""Deployments: which releases answer for an alias, promoted and rolled back by exchanging one pointer.

Owns aliases, arms, who gets which, and the order of a promotion: build, warm up, write down, exchange. A version that
cannot be used is refused before anything changes. Knows nothing of requests beyond the key they are sticky by.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from peft_combo.errors import PeftComboError, did_you_mean, shorten
from peft_combo.serving.aliases import read_share
from peft_combo.serving.answers import AdapterStatus, Arm, ArmStatus, Job, Swap, SwapResult
from peft_combo.serving.arms import ArmCounts, Arms, DeployedRelease
from peft_combo.serving.compared import ComparedReleases
from peft_combo.serving.errors import Conflict, RefusedRelease, UnknownAdapter
from peft_combo.serving.live_items import LiveItems
from peft_combo.serving.release import FROZEN, Release, ReleaseBuilder, ReleaseView
from peft_combo.serving.state import State
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.references import parse_reference

Follow = Literal["watch", "told", "fixed"]

_SWAPS, _JOBS = 200, 50


class Deployments:
    """Every alias that is served. Looking one up takes no lock; changes take turns.

    Args:
        follow: who moves aliases: the store ("watch"), a promotion ("told"), nobody ("fixed").
        keep_previous: keep the release that prod meant before in memory, for a rollback at once.
    """

    def __init__(
        self, builder: ReleaseBuilder, store: AdapterStore, state: State, items: LiveItems, follow: Follow,
        on_note: Callable[[str], None], keep_previous: bool = True,
    ) -> None:  # fmt: skip
        self._builder, self._store, self._state, self._items = builder, store, state, items
        self.follow, self._on_note, self._keep = follow, on_note, keep_previous
        self._arms: Mapping[str, Arms] = {}
        self._lock = threading.RLock()  # over every exchange
        self._busy: set[str] = set()  # aliases being promoted
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._last_job: dict[str, str] = {}
        self.swaps: deque[Swap] = deque(maxlen=_SWAPS)
        self._refused: dict[str, str] = {}  # alias -> version of the store that was not taken into use
        self._compared = ComparedReleases(
            lambda version: self._deploy(self._find_release(version) or self._builder.build(version), 0.0),
            lambda one: self._release_unused(Arms(one)), on_note,
        )  # fmt: skip
        self._seen = 0  # sequence number of deployments
        self._unfollowed: dict[str, dict[str, tuple[str, float]]] = {}  # alias -> the last state that was written down

    # Looking up.

    @property
    def aliases(self) -> tuple[str, ...]:
        """The aliases that are served, the first being the one that answers where none is named."""
        return tuple(self._arms)

    @property
    def behind(self) -> bool:
        """Whether another worker moved an alias while it was being changed here; see `follow_state`."""
        return bool(self._unfollowed)

    def find(self, name: str | None, key: str) -> tuple[str, Arm, DeployedRelease, Arms | None]:
        """Return alias, arm and release that answer a request.

        Args:
            name: an alias, or a version that is in use; None for the first alias. key: what the arm sticks to.
        Raises:
            UnknownAdapter: neither is served. Conflict: the version is being built.
        """
        arms_of = self._arms
        if not arms_of:
            raise UnknownAdapter("No adapter is served.")
        if name is None:
            name = next(iter(arms_of))
        arms = arms_of.get(name)
        if arms is not None:
            arm, deployed = arms.pick(name, key)
            return name, arm, deployed, arms
        for alias, own in arms_of.items():
            for arm, deployed in own.list_named().items():
                if deployed.release.version == name:
                    return alias, arm, deployed, None
        compared = self._compared.find(name)
        if compared is not None:
            return name, "shadow", compared, None
        raise UnknownAdapter(self._explain_unknown(name))

    def compare(self, version: str) -> None:
        """Start building a version that is no arm, so that requests may name it: a few are kept.

        Raises:
            UnknownAdapter: the store has no such version. RefusedRelease: it could not be built a moment ago.
        """
        try:
            if version != FROZEN:
                self._store.resolve(version)
        except PeftComboError as error:
            raise UnknownAdapter(str(error)) from error
        self._compared.start(version)

    def releases(self) -> list[Release]:
        """Return every release in use, each once."""
        found = [arm.release for arms in self._arms.values() for arm in arms.list_named().values()]
        found += [one.release for one in self._compared.list_all()]
        return list({id(one): one for one in found}.values())

    def list_status(self) -> list[AdapterStatus]:
        """Return every alias with its arms."""
        return [self.describe(alias) for alias in self._arms]

    def describe(self, alias: str) -> AdapterStatus:
        """Return one alias with its arms."""
        arms = self._require(alias)
        job = self._jobs.get(self._last_job.get(alias, ""))
        described: dict[str, ArmStatus] = {
            str(name): ArmStatus(
                arm.release.version, arm.release.digest, arm.release.release,
                100.0 - (arms.next.share if arms.next else 0.0) if name == "prod" else arm.share, arm.release.since,
                arm.counts.requests,
                1e3 * arm.counts.seconds / arm.counts.requests if arm.counts.requests else None,
                arm.release.nbytes, arm.release.metrics,
            )
            for name, arm in arms.list_named().items()
        }  # fmt: skip
        previous = arms.previous[-1] if arms.previous else None
        return AdapterStatus(alias, self.follow, described, previous, True, job)

    def find_job(self, job_id: str) -> Job:
        """Return a promotion under way or done.

        Raises:
            UnknownAdapter: there is none of that id, or it is long over.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise UnknownAdapter(f"No promotion has the id {shorten(job_id)}; the last {_JOBS} are known.")
        return job

    # Changing.

    def load(self, alias: str, actor: str = "", *, record: bool = True) -> AdapterStatus:
        """Serve an alias by what the state or the store says it means.

        Raises:
            UnknownAdapter: neither knows it. RefusedRelease: its version cannot be used.
        """
        if alias in self._arms:
            return self.describe(alias)
        known = self._state.deployments().get(alias, {})
        stored = self._resolve(alias)
        version = known["prod"].version if "prod" in known else None
        if version is not None and version != FROZEN and not self._is_stored(version):
            self._on_note(f"{alias} meant {version}, which is no longer stored.")
            version, known = None, {}
        if stored is not None and (version is None or self.follow != "told"):
            version, known = stored, known if version == stored else {}
        if version is None:
            raise UnknownAdapter(self._explain_unknown(alias))
        self._require_free(alias)
        try:
            prod = self._deploy(self._builder.build(version), 100.0)
            others = {
                name: self._deploy(self._builder.build(arm.version), arm.share)
                for name, arm in known.items()
                if name in ("next", "shadow") and (arm.version == FROZEN or self._is_stored(arm.version))
            }
            with self._lock:
                arms = Arms(prod, others.get("next"), others.get("shadow"), self._read_history(alias, version))
                if record and arms.list_state() != known:
                    self._state.put_deployment(alias, arms.list_state(), actor or "start", "load")
                self._set(alias, arms)
        finally:
            self._busy.discard(alias)
        return self.describe(alias)

    def promote(
        self, alias: str, version: str, split: Mapping[str, float] | None, shadow: bool, wait: bool, actor: str
    ) -> AdapterStatus:
        """Let an alias mean a version; see `Service.promote`."""
        if self.follow == "fixed":
            raise Conflict("Aliases are fixed (--adapters fixed). Start the service anew with told or watch.")
        self._require(alias)
        share = read_share(split)
        target = self._name_version(alias, version)
        self._require_free(alias)
        job = Job(uuid.uuid4().hex[:12], alias, target, "building", "waiting", time.time())
        self._note_job(job)
        thread = threading.Thread(
            target=self._run_job, args=(job, share, shadow, actor), name=f"promote {target}", daemon=True
        )
        thread.start()
        if wait:
            thread.join()
            done = self._jobs[job.job_id]
            if done.state == "refused":
                raise RefusedRelease(done.error or "refused")
        return self.describe(alias)

    def rollback(self, alias: str, actor: str = "") -> AdapterStatus:
        """Take back a split or shadow, else the last promotion.

        Raises:
            Conflict: there is nothing before.
        """
        if self.follow == "fixed":
            raise Conflict("Aliases are fixed (--adapters fixed). Start the service anew with told or watch.")
        arms = self._require(alias)
        self._require_free(alias)
        started = time.monotonic()
        try:
            if arms.next is not None or arms.shadow is not None:
                changed = replace(arms, next=None, shadow=None)
                self._exchange(alias, changed, "rolled back", actor, "rollback", started)
                return self.describe(alias)
            if not arms.previous:
                raise Conflict(f"{alias} has always meant {arms.prod.release.version}: there is nothing to go back to.")
            before = arms.previous[-1]
            kept = arms.kept
            release = kept if kept is not None and kept.version == before else self._builder.build(before)
            changed = Arms(self._deploy(release, 100.0), previous=arms.previous[:-1])
            self._exchange(alias, changed, "rolled back", actor, "rollback", started)
        finally:
            self._busy.discard(alias)
        return self.describe(alias)

    def unload(self, alias: str, actor: str = "") -> None:
        """Stop serving an alias.

        Raises:
            Conflict: it is the last one, or is being promoted.
        """
        arms = self._require(alias)
        self._require_free(alias)
        try:
            with self._lock:
                if len(self._arms) == 1:
                    raise Conflict(f"{alias} is the only alias that is served; load another before.")
                self._state.put_deployment(alias, {}, actor, "unload")
                self._arms = {name: own for name, own in self._arms.items() if name != alias}
                version = arms.prod.release.version
                self.swaps.appendleft(Swap(time.time(), alias, version, "", "unloaded", 0.0, 0.0))
            self._release_unused(arms)
        finally:
            self._busy.discard(alias)

    def refresh_items(self) -> None:
        """Show every release with today's items."""
        with self._lock:
            renew = self._make_renewal()
            self._arms = {alias: _exchange_arms(arms, renew) for alias, arms in self._arms.items()}
            self._compared.renew(renew)

    def follow_state(self) -> None:
        """Do what other workers did: they wrote it down.

        One's own change is written down and shown under the same lock, so none is taken for another worker's that has
        been overtaken since. What comes while an alias is being changed is looked at once that is done.
        """
        with self._lock:
            for row in self._state.deployments_since(self._seen):
                self._seen = max(self._seen, row.seq)
                self._unfollowed[row.alias] = {name: (arm.version, arm.share) for name, arm in row.arms.items()}
            for alias in self._unfollowed.keys() - self._busy:
                mine, told = self._arms.get(alias), self._unfollowed.pop(alias)
                if mine is None or not told or mine.list_state() == told:
                    continue
                self._busy.add(alias)
                threading.Thread(
                    target=self._follow_row, args=(alias, told), name=f"follow {alias}", daemon=True
                ).start()

    def follow_store(self) -> None:
        """Promote what an alias of the store means by now; called again and again where the store is watched."""
        for alias, arms in list(self._arms.items()):
            with suppress(PeftComboError):
                stored = self._resolve(alias)
                known = {arms.prod.release.version, arms.next.release.version if arms.next else ""}
                if stored is None or stored in known or self._refused.get(alias) == stored or alias in self._busy:
                    continue
                self._refused[alias] = stored  # until it has worked: a version is tried once
                self.promote(alias, stored, None, False, False, "watch")

    # The steps of a change.

    def _run_job(self, job: Job, share: float | None, shadow: bool, actor: str) -> None:
        started = time.monotonic()
        alias = job.alias
        try:
            release = self._find_release(job.version) or self._builder.build(
                job.version, lambda stage: self._note_job(replace(job, stage=stage))
            )
            arms = self._arms[alias]
            deployed = self._deploy(release, 0.0 if shadow else 100.0 if share is None else share)
            result: SwapResult = "promoted"
            if shadow:
                changed, action, result = replace(arms, shadow=deployed), "shadow", "shadow"
            elif share is not None:
                changed, action, result = replace(arms, next=deployed), "split", "split"
            elif release is arms.prod.release:
                changed, action = replace(arms, next=None, shadow=None), "promote"
            else:
                before = arms.prod.release
                previous = (*arms.previous, before.version)[-100:]
                changed, action = Arms(deployed, None, None, previous, before if self._keep else None), "promote"
            self._exchange(alias, changed, result, actor, action, started)
            self._refused.pop(alias, None)
            self._note_job(replace(job, state="done", stage="in use", finished=time.time()))
        except Exception as error:
            text = str(error) if isinstance(error, PeftComboError) else f"{type(error).__name__}: {error}"
            took = 1e3 * (time.monotonic() - started)
            before_version = self._arms[alias].prod.release.version if alias in self._arms else None
            self.swaps.appendleft(Swap(time.time(), alias, before_version, job.version, "refused", took, 0.0, text))
            self._note_job(replace(job, state="refused", stage="refused", finished=time.time(), error=text))
            self._on_note(f"{alias} stays as it is: {text}")
        finally:
            self._busy.discard(alias)

    def _exchange(self, alias: str, changed: Arms, result: SwapResult, actor: str, action: str, started: float) -> None:
        """Write a change down, then let it be seen: all at once. What cannot be written down does not happen."""
        before = self._arms[alias]
        self._move_store(alias, before, changed)
        with self._lock:
            built = time.monotonic()
            try:
                self._state.put_deployment(alias, changed.list_state(), actor, action)
            except PeftComboError:
                self._move_store(alias, changed, before)
                raise
            self._set(alias, self._renew(changed))
            swapped = time.monotonic()
            after = {"split": changed.next, "shadow": changed.shadow}.get(result) or changed.prod
            self.swaps.appendleft(
                Swap(
                    time.time(), alias, before.prod.release.version, after.release.version, result,
                    1e3 * (built - started), 1e3 * (swapped - built),
                )
            )  # fmt: skip
        self._release_unused(before)

    def _follow_row(self, alias: str, told: Mapping[str, tuple[str, float]]) -> None:
        started = time.monotonic()
        try:
            found = {
                name: self._deploy(self._find_release(version) or self._builder.build(version), share)
                for name, (version, share) in told.items()
            }
            before = self._arms[alias]
            previous = self._read_history(alias, told["prod"][0])
            kept = before.prod.release if self._keep and before.prod.release.version in previous[-1:] else None
            with self._lock:
                self._set(
                    alias, self._renew(Arms(found["prod"], found.get("next"), found.get("shadow"), previous, kept))
                )
                took = 1e3 * (time.monotonic() - started)
                self.swaps.appendleft(
                    Swap(time.time(), alias, before.prod.release.version, told["prod"][0], "promoted", took, 0.0)
                )
            self._release_unused(before)
        except Exception as error:
            self._on_note(f"{alias} stays as it is here, though another worker moved it: {error}")
        finally:
            self._busy.discard(alias)

    def _deploy(self, release: Release, share: float) -> DeployedRelease:
        return DeployedRelease(self._items.view(release), share, ArmCounts())

    def _make_renewal(self) -> Callable[[DeployedRelease], DeployedRelease]:
        """Return what shows releases with the items of this moment, each release once however many arms have it."""
        fresh: dict[int, ReleaseView] = {}

        def renew(arm: DeployedRelease) -> DeployedRelease:
            if arm.view.items == self._items.number:
                return arm
            if id(arm.release) not in fresh:
                fresh[id(arm.release)] = self._items.view(arm.release)
            return replace(arm, view=fresh[id(arm.release)])

        return renew

    def _renew(self, arms: Arms) -> Arms:
        """Return arms with the items of this moment: some may have come while a release was built."""
        return _exchange_arms(arms, self._make_renewal())

    def _set(self, alias: str, arms: Arms) -> None:
        self._arms = {**self._arms, alias: arms}

    def _release_unused(self, before: Arms) -> None:
        """Drop what only releases that are gone needed."""
        used = {id(one) for one in self.releases()} | {id(arms.kept) for arms in self._arms.values()}
        for arm in before.list_named().values():
            if id(arm.release) not in used:
                self._items.drop(arm.release)
                self._builder.drop(arm.release)

    def _find_release(self, version: str) -> Release | None:
        """Return a release of a version that is in memory."""
        found = [*self.releases(), *(arms.kept for arms in self._arms.values() if arms.kept is not None)]
        return next((one for one in found if one.version == version), None)

    def _move_store(self, alias: str, before: Arms, changed: Arms) -> None:
        """Let the store's alias mean what prod means by now, so that the command line sees the same."""
        version = changed.prod.release.version
        if version == before.prod.release.version or version == FROZEN:
            return
        wanted = parse_reference(alias)
        if wanted.alias is not None and self._resolve(alias) != version:
            self._store.alias(version, wanted.alias)

    def _resolve(self, alias: str) -> str | None:
        """Return the version that the store says an alias means; None where it knows none."""
        if alias == FROZEN:
            return FROZEN
        try:
            return str(self._store.resolve(alias))
        except PeftComboError:
            return None

    def _is_stored(self, version: str) -> bool:
        return self._resolve(version) is not None

    def _name_version(self, alias: str, version: str) -> str:
        """Return the version in full: v3 and 3 mean one of the alias's category."""
        if version == FROZEN:
            return FROZEN
        category = parse_reference(alias).category
        text = version if "@" in version or version == category else f"{category}@v{version.removeprefix('v')}"
        try:
            return str(self._store.resolve(text))
        except PeftComboError as error:
            raise UnknownAdapter(str(error)) from error

    def _read_history(self, alias: str, version: str) -> tuple[str, ...]:
        """Return what prod meant before, as the state tells it."""
        standing: list[str] = []
        for row in self._state.deployments_since(0):
            if row.alias != alias or "prod" not in row.arms:
                continue
            own = row.arms["prod"].version
            if row.action == "rollback" and len(standing) > 1 and standing[-2] == own:
                standing.pop()
            elif not standing or standing[-1] != own:
                standing.append(own)
        return tuple(standing[:-1] if standing and standing[-1] == version else standing)[-100:]

    def _require(self, alias: str) -> Arms:
        arms = self._arms.get(alias)
        if arms is None:
            raise UnknownAdapter(self._explain_unknown(alias))
        return arms

    def _require_free(self, alias: str) -> None:
        """Mark an alias as being changed, until it is discarded from `_busy`."""
        with self._lock:
            if alias in self._busy:
                raise Conflict(f"{alias} is being changed. Wait until that is done.")
            self._busy.add(alias)

    def _note_job(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.job_id] = job
            self._last_job[job.alias] = job.job_id
            while len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)

    def _explain_unknown(self, name: str) -> str:
        served: Sequence[str] = (*self._arms, *(one.version for one in self.releases()))
        hint = did_you_mean(name, served)
        return f'No adapter "{shorten(name)}" is served. Served: {", ".join(self._arms) or "none"}. {hint}'.rstrip()


def _exchange_arms(arms: Arms, renew: Callable[[DeployedRelease], DeployedRelease]) -> Arms:
    """Return arms with each release exchanged for what `renew` makes of it."""
    named = {name: renew(arm) for name, arm in arms.list_named().items()}
    return replace(arms, prod=named["prod"], next=named.get("next"), shadow=named.get("shadow"))
