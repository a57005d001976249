"""Where the API server is, whether to trust it, and who we are: by a kubeconfig, or by the account of our own pod.

`connection` makes one `Login` and asks it at each request. A kubeconfig, with all its ways to log in, is read by the
official client, which is imported for that alone: it and what it brings take as much memory as five hundred jobs, and
would be half of the operator's image, which does without it. A pod is told by two variables and two files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

__all__ = ["Login", "Unusable", "proxy_of_environment"]

ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_LOGIN_SECONDS = 10.0  # between two attempts to log in anew
_TOKEN_SECONDS = 60.0
_log = logging.getLogger(__name__)


class Unusable(ValueError):
    """What should say how to reach the cluster does not; the message names the file and what is wrong."""


class Login:
    """What a kubeconfig or the pod's account says, read again when it no longer serves."""

    def __init__(self, kubeconfig: Path | None, context: str | None) -> None:
        """Without `kubeconfig` it is $KUBECONFIG, the pod's account, or ~/.kube/config. Nothing is read yet."""
        self._file = kubeconfig or _kubeconfig_from_environment()
        self._context = context
        self._lock = asyncio.Lock()
        self._loaded_at = 0.0
        self.configuration: Any = None
        self.tls: ssl.SSLContext | None = None

    async def load(self) -> None:
        """Raises Unusable."""
        where = str(self._file) if self._file else "the pod's service account"
        # $KUBECONFIG may name several files, which the client merges.
        if self._file is not None and not any(Path(one).is_file() for one in str(self._file).split(os.pathsep)):
            raise Unusable(f"{self._file} is not there; name a kubeconfig with --kubeconfig or $KUBECONFIG")
        try:
            if self._file is None:
                configuration: Any = _PodAccount(ACCOUNT_FOLDER)
            else:
                configuration = await _of_kubeconfig(self._file, self._context)
            self._trust(configuration)
        except Unusable:
            raise
        except Exception as error:  # a malformed file makes the client raise whatever its code stumbles over
            raise Unusable(f"{where} does not say how to reach a cluster: {error}") from error
        configuration.proxy = configuration.proxy or proxy_of_environment(str(configuration.host))
        self.configuration = configuration
        self._loaded_at = asyncio.get_running_loop().time()

    async def renew(self, asked_at: float) -> bool:
        """Reads everything anew, unless that was done since `asked_at`; whether asking again is worth it."""
        async with self._lock:
            if self._loaded_at > asked_at:
                return True
            if asked_at - self._loaded_at < _LOGIN_SECONDS:
                return False
            try:
                await self.load()
            except Unusable as error:
                _log.warning("could not log in anew: %s", error)
                return False
            return True

    async def headers(self) -> dict[str, str]:
        """Who we are."""
        token = await self.configuration.get_api_key_with_prefix("BearerToken")
        return {"Authorization": token} if token else {}

    def options(self) -> dict[str, Any]:
        """How to get there, for each request."""
        configuration = self.configuration
        options = {
            "proxy": configuration.proxy,
            "proxy_headers": configuration.proxy_headers,
            "server_hostname": configuration.tls_server_name,
        }
        return {name: value for name, value in options.items() if value}

    def _trust(self, configuration: Any) -> None:
        """Certificates go into the context that is in use, so that a renewed one holds for new connections."""
        if not str(configuration.host).startswith("https"):
            return
        if self.tls is None:
            self.tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
        elif configuration.ssl_ca_cert:
            self.tls.load_verify_locations(cafile=configuration.ssl_ca_cert)
        if configuration.cert_file:
            self.tls.load_cert_chain(configuration.cert_file, configuration.key_file)
        if not configuration.verify_ssl:
            self.tls.check_hostname = False
            self.tls.verify_mode = ssl.CERT_NONE


class _PodAccount:
    """The service account of the pod, in the words of the official client's configuration."""

    ca_cert_data = cert_file = key_file = proxy_headers = tls_server_name = None
    verify_ssl = True

    def __init__(self, folder: Path) -> None:
        """Raises OSError, KeyError."""
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        self.host = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        authority = folder / "ca.crt"
        authority.stat()  # names it where it is missing, which ssl does not
        self.ssl_ca_cert = str(authority)
        self.proxy: str | None = None
        self._file = folder / "token"
        self._read()

    async def get_api_key_with_prefix(self, _: str) -> str:
        """The token, read again every minute: the kubelet replaces it."""
        if asyncio.get_running_loop().time() - self._read_at > _TOKEN_SECONDS:
            self._read()
        return self._token

    def _read(self) -> None:
        self._token = f"Bearer {self._file.read_text(encoding='ascii').strip()}"
        self._read_at = asyncio.get_running_loop().time()


async def _of_kubeconfig(file: Path, context: str | None) -> Any:
    try:
        from kubernetes.aio import config
        from kubernetes.aio.client import Configuration
    except ModuleNotFoundError as error:  # as in the operator's image, which is for pods
        raise Unusable(f"{file}: a kubeconfig takes more packages: pip install 'finetune-operator[client]'") from error

    configuration: Any = Configuration()
    client: Any = config  # it has no types
    await client.load_kube_config(str(file), context, client_configuration=configuration, persist_config=False)
    return configuration


def _kubeconfig_from_environment() -> Path | None:
    """None for a pod's own service account."""
    if named := os.environ.get("KUBECONFIG"):
        return Path(named)
    return None if os.environ.get("KUBERNETES_SERVICE_HOST") else Path.home() / ".kube" / "config"


def proxy_of_environment(host: str) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say. Looked up once: aiohttp would do so for each request, in a thread."""
    url = urlsplit(host)
    if proxy_bypass(url.hostname or ""):
        return None
    return getproxies_environment().get(url.scheme)
