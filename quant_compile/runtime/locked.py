"""Keep a lock: write what each weight got, or tell what differs from what the file says.

A file that is not there, or that is to be updated, is written while graphs are made; one that is there is enforced. Which of
both is settled when a compilation begins, so that its second graph does not enforce what its first has written.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock

from torch.nn import Parameter

from quant_compile.ir.errors import LockError, LockWarning
from quant_compile.ir.lock import IN_16_BITS, Lock, LockedSite, shown
from quant_compile.lowering.target import Target
from quant_compile.model.ledger import Sessions
from quant_compile.model.names import Owners
from quant_compile.options import Options
from quant_compile.passes.plan import SiteDecision, dispatches_of
from quant_compile.policy import Policy
from quant_compile.runtime.decide import Found
from quant_compile.runtime.variant import Variant

LIBRARIES = ("quant-compile", "torch", "triton", "transformers", "sglang-kernel", "humming-kernels", "sgl-deep-gemm")


class Keeper:
    """The lock of one file, for one compilation of a model."""

    def __init__(self, path: Path, update: bool) -> None:
        """Read the file where it is to be enforced.

        Raises:
            LockError: it is no lock; names the line. Or there is no folder to write it into.
        """
        self.path = path
        self.locked = None if update or not path.exists() else Lock.load(path)
        self._written: Lock | None = None
        self._mutex = RLock()
        if self.locked is None and not path.absolute().parent.is_dir():
            raise LockError(
                f"the lock {path} cannot be written: there is no such folder. Fix: make it, or name another file."
            )

    def keep(self, policy: Policy, target: Target, sites: Mapping[str, LockedSite], sessions: Sessions) -> None:
        """Take in what one graph does with its weights.

        Raises:
            LockError: it differs from the lock, and the policy is strict; or the file cannot be written.
        """
        with self._mutex:
            now = Lock(policy.name, policy.content_hash, target.label, target.name, versions(), sites)
            if self.locked is None:
                self._write(now)
            elif text := self.differences(self.locked, now):
                if policy.strict:
                    raise LockError(text)
                sessions.note(text)
                warnings.warn(text, LockWarning, stacklevel=2)

    def _write(self, now: Lock) -> None:
        known = self._written.sites if self._written is not None else {}
        added = {name: known[name].also(site) if name in known else site for name, site in now.sites.items()}
        whole = replace(now, sites={**known, **added})
        if whole != self._written:
            whole.save(self.path)
            self._written = whole

    def differences(self, locked: Lock, now: Lock) -> str:
        """What differs, in words, or nothing."""
        groups: dict[str, list[str]] = {}
        for name, site in now.sites.items():
            old = locked.sites.get(name)
            if old is None:
                groups.setdefault("not in the lock", []).append(name)
            elif what := old.differs(site):
                groups.setdefault(_said(old, site, what), []).append(name)
        if not groups:
            return ""
        count = sum(map(len, groups.values()))
        lines = [f"{count} {'weight has' if count == 1 else 'weights have'} changed since the lock {self.path}:"]
        lines += [f"  {said}: {shown(names)}" for said, names in groups.items()]
        around = locked.environment(now)
        if locked.policy_hash != now.policy_hash:
            around = (f"policy {locked.policy} → {now.policy}, whose content differs", *around)
        lines += [f"Since then: {', '.join(around)}."] if around else []
        return "\n".join([*lines, "Fix: lock_update=True, if this is meant to be so."])


def _said(old: LockedSite, now: LockedSite, what: Sequence[str]) -> str:
    """What changed of a weight."""
    values = {
        "scheme": (old.scheme or "kept", now.scheme or "kept"),
        "kernel": (" / ".join(old.kernels) or "none", " / ".join(now.kernels) or "none"),
        "layout": (old.layout or "none", now.layout or "none"),
        "fusion": ("; ".join(old.joined) or "none", "; ".join(now.joined) or "none"),
    }
    return ", ".join(f"{word} {values[word][0]} → {values[word][1]}" for word in what)


def versions() -> dict[str, str]:
    """Libraries that decide which kernels there are, as they are installed."""
    found: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_KEEPERS: dict[Path, Keeper] = {}


def begin(options: Options) -> None:
    """A compilation begins: its lock is read, or is to be written anew.

    Raises:
        LockError: as ``Keeper``.
    """
    if options.lock is not None:
        path = Path(options.lock)
        _KEEPERS[path.absolute()] = Keeper(path, options.lock_update)


def keeper_of(options: Options) -> Keeper | None:
    """What keeps the lock that the options name."""
    if options.lock is None:
        return None
    if Path(options.lock).absolute() not in _KEEPERS:
        begin(options)
    return _KEEPERS[Path(options.lock).absolute()]


def sites_of(
    found: Found, parameters: Mapping[int, Parameter], decisions: Mapping[str, SiteDecision], variant: Variant
) -> dict[str, LockedSite]:
    """What a variant does with each weight that a site multiplies by, by name."""
    dispatches = dispatches_of(variant.reports)
    owners = Owners.of(parameters.values())
    out: dict[str, LockedSite] = {}
    for slot, decision in found.decided(decisions):
        known = owners.names(parameters[slot])
        name = known.full[0] if known is not None else decision.name
        if decision.scheme is None:
            site = LockedSite(decision.asked.spec, "", (IN_16_BITS,)) if decision.asked else LockedSite(None)
        else:
            dispatch, joined = dispatches[slot], variant.views.joined.get(slot, ())
            site = LockedSite(decision.scheme.spec, dispatch.layout, (dispatch.ranges,), joined)
        out[name] = out[name].also(site) if name in out else site
    return out
