"""Keep a lock: write what each weight got, or tell what differs from what the file says.

A file that is not there, or that is to be updated, is written while graphs are made; one that is there is enforced. Which of
both is settled when a compilation begins, so that its second graph does not enforce what its first has written.
"""

from __future__ import annotations

import importlib.metadata
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock

from torch.nn import Module, Parameter

from quant_compile.ir.errors import LockError, LockWarning
from quant_compile.ir.lock import IN_16_BITS, Lock, LockedSite, shown
from quant_compile.lowering.identity import local_of, peek_anchor, shard_of
from quant_compile.lowering.target import Target
from quant_compile.model.ledger import Sessions
from quant_compile.model.names import Owners, names_in
from quant_compile.model.places import parameters_of
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
        self.path, self._update = path, update
        self.locked = None if update or not path.exists() else Lock.load(path)
        self._written: Lock | None = None
        self._told = set[str]()
        self._mutex = RLock()
        if self.locked is None and not path.absolute().parent.is_dir():
            raise LockError(
                f"the lock {path} cannot be written: there is no such folder. Fix: make it, or name another file."
            )

    def keep(self, policy: Policy, target: Target, sites: Mapping[str, LockedSite], sessions: Sessions) -> None:
        """Take in what one graph does with its weights.

        Where another model of this process has written the file since, this one is held to that.

        Raises:
            LockError: it differs from the lock, and the policy is strict; or the file cannot be written.
        """
        with self._mutex:
            now = Lock(policy.name, hash_of(policy), target.label, target.name, versions(), sites)
            last = _WROTE.get(self.path.absolute())
            other = last is not None and last() not in (None, self)
            if other and (self._written is not None or not self._update) and self.locked is None:
                self.locked = Lock.load(self.path)
            if self.locked is None:
                self._write(now)
            elif text := self.differences(self.locked, now, policy.content_hash):
                if policy.strict:
                    raise LockError(text)
                sessions.note(text)
                if text not in self._told:  # a graph is kept when it is compiled, and when it is bound
                    self._told.add(text)
                    warnings.warn(text, LockWarning, stacklevel=2)

    def without(self, names: Iterable[str]) -> str:
        """Weights of the lock that are not among these, in words, or nothing."""
        known = set(names)
        gone = [name for name in self.locked.sites if name not in known] if self.locked is not None else []
        if not gone:
            return ""
        what = "weight of the lock is" if len(gone) == 1 else "weights of the lock are"
        return (
            f"{len(gone)} {what} not in the model, {self.path}: {shown(gone)}\n"
            "Fix: lock_update=True, if this is meant to be so."
        )

    def _write(self, now: Lock) -> None:
        known = self._written.sites if self._written is not None else {}
        added = {name: known[name].also(site) if name in known else site for name, site in now.sites.items()}
        whole = replace(now, sites={**known, **added})
        if whole != self._written:
            whole.save(self.path)
            self._written = whole
            _WROTE[self.path.absolute()] = weakref.ref(self)

    def differences(self, locked: Lock, now: Lock, also: str) -> str:
        """What differs, in words, or nothing; ``also``: what the policy's hash was in files of earlier versions."""
        groups: dict[str, list[str]] = {}
        for name, site in now.sites.items():
            old = locked.sites.get(name)
            if old is None:
                groups.setdefault("not in the lock", []).append(name)
            elif changed := old.differs(site):
                groups.setdefault(_said(old, site, changed), []).append(name)
        same = locked.policy_hash in (now.policy_hash, also)
        if not groups and same:
            return ""
        count = sum(map(len, groups.values()))
        what = {0: "the policy has", 1: "1 weight has"}.get(count, f"{count} weights have")
        lines = [f"{what} changed since the lock {self.path}{':' if count else ', and no scheme or kernel with it.'}"]
        lines += [f"  {said}: {shown(names)}" for said, names in groups.items()]
        around = locked.environment(now)
        if not same:
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
        "shape": (list(old.shape), list(now.shape)),
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


# A file's keepers: of each model that was compiled with it, and of functions and models that torch.compile was given.
_OF_MODELS: dict[Path, weakref.WeakKeyDictionary[Module, Keeper]] = {}
_OF_OTHERS: dict[Path, Keeper] = {}
_WROTE: dict[Path, weakref.ref[Keeper]] = {}  # file -> who wrote it last, in this process: ranks write one file alike


def hash_of(policy: Policy) -> str:
    """Of all that decides what a policy computes, but not of how its user wants to hear of it."""
    plain = replace(policy, strict=False, verify=False, release_weights=None, allow_reference=False)
    return plain.content_hash


def begin(options: Options) -> Keeper | None:
    """A model's compilation begins: its lock is read, or is to be written anew.

    Raises:
        LockError: as ``Keeper``.
    """
    return None if options.lock is None else Keeper(Path(options.lock), options.lock_update)


def hold(keeper: Keeper, model: Module, strict: bool) -> str:
    """Let a keeper have a model, of all that hold its weights the last one.

    Returns:
        What to note: weights of the lock that the model has not; or nothing.

    Raises:
        LockError: there are such weights, and ``strict``; nothing has been changed.
    """
    text = keeper.without(name for held in names_in(model).values() for name in held.full)
    if text and strict:
        raise LockError(text)
    if text:
        warnings.warn(text, LockWarning, stacklevel=3)
    drop(model)
    _OF_MODELS.setdefault(keeper.path.absolute(), weakref.WeakKeyDictionary())[model] = keeper
    return text


def drop(model: Module) -> None:
    """A model is compiled anew, or not any more."""
    for keepers in _OF_MODELS.values():
        keepers.pop(model, None)


def keeper_of(options: Options, parameters: Iterable[Parameter]) -> Keeper | None:
    """What keeps the lock that the options name, for the model that has these weights.

    Raises:
        LockError: as ``Keeper``.
    """
    if options.lock is None:
        return None
    path, wanted = Path(options.lock).absolute(), set(map(_identity, parameters))
    for model, keeper in reversed(list(_OF_MODELS.get(path, {}).items())):
        if any(_identity(parameter) in wanted for parameter in parameters_of(model)):
            return keeper
    if path not in _OF_OTHERS:
        _OF_OTHERS[path] = Keeper(Path(options.lock), options.lock_update)
    return _OF_OTHERS[path]


def _identity(parameter: Parameter) -> int:
    anchor = peek_anchor(parameter)
    return id(local_of(parameter)) if anchor is None else anchor.identity


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
        if shard_of(parameters[slot]) is None:  # ranks have other sizes of one weight
            site = replace(site, shape=tuple(parameters[slot].shape))
        out[name] = out[name].also(site) if name in out else site
    return out
