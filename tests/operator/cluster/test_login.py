"""In a pod, its own account opens the cluster: by two variables and two files, and without the official client."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from finetune_operator.cluster import login
from finetune_operator.cluster.connection import connect
from finetune_operator.cluster.login import Login, Unusable
from finetune_operator.errors import Unreachable
from tests.certificates import self_signed
from tests.operator.runtime.virtual_time import run as run_in_virtual_time


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pod's account, in the pod."""
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "ca.crt").write_bytes(self_signed(tmp_path).read_bytes())
    (folder / "token").write_text("first\n", encoding="ascii")
    monkeypatch.setattr(login, "ACCOUNT_FOLDER", folder)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return folder


@asynccontextmanager
async def api_server(certificate: Path, tokens: list[str]) -> AsyncIterator[int]:
    """One over TLS, which notes what it is shown; its port."""

    async def note(request: web.Request) -> web.StreamResponse:
        tokens.append(request.headers["Authorization"])
        return web.json_response({})

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
    runner.app.router.add_get("/version", note)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def test_a_pods_account_knows_the_server_and_is_known_to_it(
    account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str] = []

    async def ask(certificate: Path) -> None:
        async with api_server(certificate, tokens) as port:
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
            async with connect() as connection:
                await connection.send("GET", "/version")

    asyncio.run(ask(tmp_path / "certificate.pem"))
    with pytest.raises(Unreachable, match="certificate"):
        asyncio.run(ask(self_signed(tmp_path / "stranger")))
    assert tokens == ["Bearer first"]


def test_a_token_that_the_kubelet_has_replaced_is_used_a_minute_later(account: Path) -> None:
    async def main() -> list[str]:
        used = Login(None, None)
        await used.load()
        (account / "token").write_text("second\n", encoding="ascii")
        seen = [(await used.headers())["Authorization"]]
        await asyncio.sleep(61)
        return [*seen, (await used.headers())["Authorization"]]

    assert run_in_virtual_time(main()) == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize(
    ("host", "url"), [("10.96.0.1", "https://10.96.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_the_address_is_the_one_that_the_kubelet_gives(
    account: Path, monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)

    async def main() -> str:
        used = Login(None, None)
        await used.load()
        return str(used.configuration.host)

    assert asyncio.run(main()) == url


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
def test_an_account_that_is_not_whole_is_named_with_what_is_missing(account: Path, missing: str) -> None:
    (account / missing).unlink()
    with pytest.raises(Unusable, match="the pod's service account does not say how to reach a cluster") as caught:
        asyncio.run(Login(None, None).load())
    assert str(account / missing) in str(caught.value)


def test_a_kubeconfig_without_the_official_client_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the operator's image."""
    (tmp_path / "config").write_text("{}", encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(Unusable, match=r"/config: a kubeconfig takes .* pip install 'finetune-operator\[client\]'$"):
        asyncio.run(Login(tmp_path / "config", None).load())


def test_a_token_that_is_gone_is_told_like_a_server_that_is_away(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "_TOKEN_SECONDS", -1.0)

    async def main() -> None:
        async with connect() as connection:
            (account / "token").unlink()
            with pytest.raises(Unreachable, match="token"):
                await connection.send("GET", "/version")
            with pytest.raises(Unreachable, match="token"):
                await anext(connection.output("/exec", []))

    asyncio.run(main())


def test_in_a_pod_the_official_client_is_not_even_loaded(account: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
from finetune_operator.cluster import connection, login

login.ACCOUNT_FOLDER = pathlib.Path({str(account)!r})

async def main():
    async with connection.connect():
        return "kubernetes" in sys.modules

print(asyncio.run(main()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
