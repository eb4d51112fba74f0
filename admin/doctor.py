"""`python gateway.py doctor`: is everything as it has to be, and if not, what is to be done (SPEC 21.6).

Reads and asks, and changes nothing: no file is made, no quota is used, and no key is shown, not even in part.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path

from adapters.registry import ADAPTERS
from config.catalog_files import CatalogFiles, base_url_variable, load_catalog
from config.proxies import proxies
from config.settings import LOOPBACK_HOSTS, Settings, SettingsError, check_binding, load_settings
from protection import Failure, UpstreamError, parse_levels
from providers import Providers, Timeouts
from records.checkup import Checkup, StoredKey, look_into
from records.vault import StoreError
from routing.catalog import KEYLESS, Key, Platform, how_written, is_demo, keeps_prompts_private
from transport.process import listen
from transport.upstream import CallFailed, Upstream
from wire.http import NO_PROXIES, Endpoint

AT_ONCE = 8  # checks of keys
ASK_S = 5.0  # for a question to a provider or to this machine
SKEW_S_MAX = 60.0  # of this machine's clock; limits by the minute and resets by the day go by it
PROVIDERS_FOR_THE_TIME = 3  # are asked at most
ANYWHERE = ("0.0.0.0", "::")


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "--"  # worth knowing
    ACT = "!!"  # there is something to do


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `todo` is what the operator is told to do."""

    verdict: Verdict
    about: str
    words: str
    todo: str = ""

    def __str__(self) -> str:
        line = f"{self.verdict}  {self.about}: {self.words}"
        return f"{line}\n      {self.todo}" if self.todo else line


def ok(about: str, words: str) -> Finding:
    return Finding(Verdict.OK, about, words)


def note(about: str, words: str, todo: str = "") -> Finding:
    return Finding(Verdict.NOTE, about, words, todo)


def todo(about: str, words: str, what: str) -> Finding:
    return Finding(Verdict.ACT, about, words, what)


async def doctor(argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> AsyncIterator[Finding]:
    """Everything that is found, as it is found."""
    try:
        settings = load_settings(argv, environ, cwd)
        ways = proxies(settings.environ)
        check_binding(settings.host, [key for key in (settings.api_key, settings.admin_key) if key])
    except SettingsError as error:
        yield todo("settings", str(error), "Correct it in the environment, in .env or among the flags.")
        return
    yield ok("settings", f"read; the address is http://{settings.host}:{settings.port}/v1")
    try:
        files = load_catalog(settings, ADAPTERS)
    except SettingsError as error:
        yield todo("catalogue", str(error), "Correct the file, or leave GATEWAY_CATALOG out.")
        return
    for finding in about_catalogue(settings, files):
        yield finding
    found: Checkup | None = None
    try:
        found = look_into(settings.db, settings.encryption_key, settings.log)
    except StoreError as error:
        mend = "or name another file with --db" if settings.log is None else "or give another address in GATEWAY_LOG"
        yield todo("database", str(error), f"Nothing was changed. Mend that, {mend}.")
    else:
        for finding in about_database(settings, found):
            yield finding
    async with Upstream(ASK_S, proxies=ways) as upstream, Upstream(ASK_S, proxies=NO_PROXIES) as here:
        yield await about_port(settings, here)
        providers = Providers(Timeouts(ASK_S, ASK_S, ASK_S), upstream)
        keys = all_keys(files, found)
        yield await about_clock(files, keys, upstream)
        async for finding in about_keys(files, keys, providers):
            yield finding
        for finding in about_privacy(settings, files, keys):
            yield finding
        async for finding in about_local_servers(files, providers):
            yield finding


def about_catalogue(settings: Settings, files: CatalogFiles) -> Iterator[Finding]:
    defaults = {platform.id: platform.protection for platform in files.platforms.values()}
    _, ignored = parse_levels(settings.thread_protection_platforms, defaults)
    for warning in (*files.warnings, *ignored):
        yield note("catalogue", warning)
    yield ok("catalogue", f"{len(files.platforms)} platforms, {len(files.models)} models")


def about_database(settings: Settings, found: Checkup | None) -> Iterator[Finding]:
    name = settings.db.name if settings.log is None else "the one of GATEWAY_LOG"
    if found is None:
        made = f"{name} is made" if settings.log is None else f"{name} answers; its tables are made"
        yield ok("database", f"{made} at the first start, and its key file beside it")
        return
    changed = "; brought to today's form at the next start" if found.is_older else ""
    yield ok("database", f"{name}, schema {found.version}, {len(found.keys)} keys{changed}")
    if found.open_key_file is not None:
        words = f"{found.open_key_file.name} can be read by others on this machine"
        yield todo("key file", words, f"chmod 600 {found.open_key_file}")
    else:
        yield ok("key file", "the right one" if settings.encryption_key is None else "ENCRYPTION_KEY, the right one")


async def about_port(settings: Settings, here: Upstream, ask_s: float = ASK_S) -> Finding:
    where = f"{settings.host}:{settings.port}"
    try:
        listen(settings.host, settings.port).close()
        return ok("port", f"{where} is free")
    except OSError as error:
        trouble = error.strerror or str(error)
    if await is_freeway(settings, here, ask_s):
        return ok("port", f"a gateway answers at {where} already")
    return todo("port", f"{where} cannot be used: {trouble}", "Choose another one with --port or GATEWAY_PORT.")


def own_address(settings: Settings) -> str:
    """Where this machine reaches the gateway that these settings describe."""
    host = LOOPBACK_HOSTS[0] if settings.host in ANYWHERE else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


async def is_freeway(settings: Settings, here: Upstream, ask_s: float) -> bool:
    try:
        async with asyncio.timeout(ask_s):
            response = await here.call("GET", Endpoint(f"{own_address(settings)}/healthz", {}))
            try:
                return response.status == 200 and b'"status"' in await response.read()
            finally:
                response.close()
    except (CallFailed, TimeoutError):
        return False


def all_keys(files: CatalogFiles, found: Checkup | None) -> list[StoredKey]:
    """Those in the database, and those of the environment and the catalogue file that the next start will add."""
    stored = list(found.keys) if found is not None else []
    known = {(key.platform, key.secret) for key in stored}
    for given in files.keys:
        if (given.platform, given.secret) not in known:
            known.add((given.platform, given.secret))
            stored.append(
                StoredKey(given.platform, given.label, given.secret, True, trains_on_prompts=given.trains_on_prompts)
            )
    return stored


def about_privacy(settings: Settings, files: CatalogFiles, keys: Sequence[StoredKey]) -> Iterator[Finding]:
    """Whom a gateway that sends prompts to nobody who trains on them can ask at all (SPEC 21.4)."""
    keyless = [platform for platform in files.platforms.values() if platform.keyless and not is_demo(platform)]
    if settings.privacy is None or not (keys or keyless):
        return
    found = {platform.id for platform in keyless if keeps_prompts_private(platform, KEYLESS)}
    for key in keys:
        platform = files.platforms.get(key.platform)
        as_routed = Key(0, key.platform, key.secret, trains_on_prompts=key.trains_on_prompts)
        if platform is not None and key.enabled and keeps_prompts_private(platform, as_routed):
            found.add(platform.id)
    if found:
        yield ok("privacy", f"{settings.privacy}: {', '.join(sorted(found))} may be asked, and nobody else")
        return
    words = "GATEWAY_PRIVACY=no-train, and no key is known not to train: every request is refused with no_private_route"
    what = "Add a key of a platform that does not train, say trains_on_prompts: false of a paid one, or unset it."
    yield todo("privacy", words, what)


async def about_clock(files: CatalogFiles, keys: Sequence[StoredKey], upstream: Upstream) -> Finding:
    """Compared with what providers say the time is."""
    named = dict.fromkeys(key.platform for key in keys if key.platform in files.platforms)
    asked = [files.platforms[id].base_url for id in named if "{" not in files.platforms[id].base_url]
    for url in asked[:PROVIDERS_FOR_THE_TIME]:
        skew_s = await skew_of(url, upstream)
        if skew_s is not None and abs(skew_s) > SKEW_S_MAX:
            words = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} what {url} says"
            return todo("clock", words, "Set it, best by the system's own time service.")
        if skew_s is not None:
            return ok("clock", f"right to within {max(1.0, abs(skew_s)):.0f} s")
    return note("clock", "not compared: no provider that has a key said what time it is")


async def skew_of(url: str, upstream: Upstream) -> float | None:
    """Seconds by which this machine is ahead of a server; None where it does not say."""
    try:
        async with asyncio.timeout(ASK_S):
            response = await upstream.call("GET", Endpoint(url, {}))
            now, date = time.time(), response.headers.get("Date", "")
            response.close()
            return now - parsedate_to_datetime(date).timestamp()
    except (CallFailed, TimeoutError, ValueError, TypeError):
        return None


async def about_keys(files: CatalogFiles, keys: Sequence[StoredKey], providers: Providers) -> AsyncIterator[Finding]:
    keyless = [p for p in files.platforms.values() if p.keyless and not is_demo(p)]
    if not keys and not keyless:
        words = "there is none, so only the built-in demo answers"
        yield todo("keys", words, "Add one on the dashboard under Keys, or by the names in catalog.json.")
    for start in range(0, len(keys), AT_ONCE):
        for finding in await asyncio.gather(
            *(about_key(files, key, providers) for key in keys[start : start + AT_ONCE])
        ):
            yield finding


async def about_key(files: CatalogFiles, key: StoredKey, providers: Providers) -> Finding:
    about = f"key of {key.platform}" + (f" ({key.label})" if key.label else "")
    platform = files.platforms.get(key.platform)
    if platform is None:
        return note(about, "the catalogue no longer has this platform")
    if not key.enabled:
        return note(about, "switched off")
    if (words := how_written(platform, key.secret)) is not None:
        return todo(about, words, replacement(platform))
    if (model := next((m for m in files.models if m.platform is platform), None)) is None:
        return note(about, "the catalogue has no model for it")
    try:
        proved = await providers.check_key(model, Key(0, platform.id, key.secret, key.label))
    except UpstreamError as error:
        return refused(about, platform, error)
    return ok(about, "works") if proved else note(about, "taken, though only a request would prove it")


def refused(about: str, platform: Platform, error: UpstreamError) -> Finding:
    """In our own words: a provider's may quote a part of the key."""
    status = f"HTTP {error.status}" if error.status is not None else str(error.failure)
    match error.failure:
        case Failure.AUTH:
            return todo(about, f"{platform.name} refuses it ({status})", replacement(platform))
        case Failure.RATE_LIMITED:
            return note(about, f"taken, and just now over a limit ({status})")
        case Failure.OUT_OF_CREDIT | Failure.FORBIDDEN:
            return todo(about, f"{platform.name} serves nothing for it ({status})", "See to its account or its rights.")
        case Failure.CONNECTION | Failure.TIMEOUT | Failure.STALL:
            words = f"{platform.base_url} cannot be reached ({error.failure})"
            return todo(about, words, f"Look at the network, the proxy settings, and {base_url_variable(platform.id)}.")
        case Failure.NOT_FOUND | Failure.BAD_REQUEST:
            return note(about, f"there is no free check at {platform.name} ({status}); only a request would prove it")
        case _:
            return todo(about, f"{platform.name} is in trouble ({status})", "Run this again in a while.")


def replacement(platform: Platform) -> str:
    where = f" from {platform.signup_url}" if platform.signup_url else ""
    variables = f", or in {' or '.join(platform.env)}" if platform.env else ""
    return f"Put a right one{where} in its place, on the dashboard under Keys{variables}."


async def about_local_servers(files: CatalogFiles, providers: Providers) -> AsyncIterator[Finding]:
    for platform in files.platforms.values():
        if platform.local and not is_demo(platform):
            yield await about_local_server(platform, providers)


async def about_local_server(platform: Platform, providers: Providers) -> Finding:
    about = f"local server {platform.id}"
    try:
        listed = await providers.list_models(platform, KEYLESS)
    except (UpstreamError, ValueError):
        words = f"nothing usable answers at {platform.base_url}"
        return todo(about, words, f"Start it, or correct or unset {base_url_variable(platform.id)}.")
    models = listed.get("data", ()) if isinstance(listed, dict) else ()
    return ok(about, f"{platform.base_url} lists {len(models)} models")
