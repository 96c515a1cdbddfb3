"""Ed25519 signatures over manifests, and the policy that says whose are wanted. Keys lie in `keys/` of a home folder.

A signature covers the manifest with name, version and base, and through the files' sha256 every byte: what was signed
as one adapter cannot be passed off as another, nor an old version as a new one. Where the policy requires signatures,
nothing passes without one: what is pulled, what is here already, what is resolved and served.
"""

import json
import os
import sqlite3
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES
from adapterhub_lite.adapter_format.manifest import SIGNATURE_FILE, AdapterManifest, HexDigest, is_name
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, UnknownNameError, UsageError
from adapterhub_lite.registry.store.database import parse_stored, write_durably
from adapterhub_lite.registry.store.store import TRUST_FILE, Store, TrustPolicy, file_record

OLD_SCHEME = f"{SIGNATURE_FILE} is of an older kind, which covers neither name nor version; have it signed again"


class Signature(StrictModel):
    """The content of `adapterhub.sig.json`; both key and signature in hex.

    Scheme 1, in files that do not name theirs, covered neither name nor version, and counts no longer.
    """

    algorithm: Literal["ed25519"] = "ed25519"
    scheme: Literal[1, 2] = 1
    public_key: HexDigest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def verifies(self, manifest: AdapterManifest) -> bool:
        """Whether it is a signature over this manifest, with this name and version, by the key it names."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public_key))
            key.verify(bytes.fromhex(self.signature), manifest.signed_bytes())
        except InvalidSignature:
            return False
        return True


class TrustSettings:
    """Reads and changes whose signatures count, as kept in `trust.json` of a home folder."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self) -> TrustPolicy:
        """The policy now; raises as `Store.trust` does."""
        return self._store.trust

    def require(self, required: bool) -> None:
        """From now on refuse what has no trusted signature, or no longer."""
        self._write(self.read().model_copy(update={"required": required}))

    def trust(self, name: str, public_key: str) -> None:
        """Trust signatures by `public_key` (64 hex digits), to be called `name`.

        Raises:
            UsageError: not a name, or not a key.
        """
        policy = self.read()
        _check_key_name(name)
        try:
            self._write(TrustPolicy(required=policy.required, keys={**policy.keys, name: public_key}))
        except ValidationError as error:
            raise UsageError(f"Wanted a public key of 64 hex digits, got {public_key!r:.80}.") from error

    def distrust(self, name: str) -> None:
        """No longer trust the key called `name`.

        Raises:
            UnknownNameError: no such key.
        """
        policy = self.read()
        if name not in policy.keys:
            raise UnknownNameError.among("trusted key", name, sorted(policy.keys))
        self._write(policy.model_copy(update={"keys": {k: v for k, v in policy.keys.items() if k != name}}))

    def audit(self) -> list[tuple[str, str]]:
        """Every version here that a policy with required signatures refuses: its reference, and why."""
        return audit(self._store)

    def _write(self, policy: TrustPolicy) -> None:
        write_durably(self._store.home / TRUST_FILE, (policy.model_dump_json(indent=1) + "\n").encode())


def incoming_signature(manifest: AdapterManifest, folder: Path, policy: TrustPolicy) -> bytes | None:
    """The signature file in `folder` for a manifest as published (None: there is none), once it satisfies the policy.

    Raises:
        IntegrityError: it is not a signature of this manifest.
        AdapterRejectedError: a trusted one is required, and this is none.
    """
    path = folder / SIGNATURE_FILE
    content = path.read_bytes() if path.is_file() else None
    problem = None if content is None else signature_problem(manifest, content)
    if problem is not None and problem != OLD_SCHEME:
        raise IntegrityError(f"{manifest.reference}: {problem}.")
    if policy.required and (reason := _distrusted(manifest, content, policy)):
        raise AdapterRejectedError(f"The adapter {manifest.reference}", [reason])
    return None if problem else content


def check_trusted(store: Store, manifest: AdapterManifest) -> None:
    """Raise unless the policy lets this version of the store be used: the door of all that resolves, loads and serves.

    Raises:
        AdapterRejectedError: a trusted signature is required, and it has none.
    """
    if reason := distrusted(store, manifest):
        raise AdapterRejectedError(
            f"The adapter {manifest.reference}",
            [f"{reason}. Look at it, then sign it with a key that is trusted here (`adapterhub-lite sign`)"],
        )


def distrusted(store: Store, manifest: AdapterManifest) -> str | None:
    """Why the policy refuses this version of the store, or None."""
    policy = store.trust
    return _distrusted(manifest, stored_signature(store, manifest), policy) if policy.required else None


def audit(store: Store) -> list[tuple[str, str]]:
    """Every version without a signature that is trusted now, with the reason: what requiring one would refuse."""
    policy, found = store.trust, []
    rows = store.read().execute("SELECT manifest, signature FROM versions ORDER BY name, version")
    for content, signature in rows.fetchall():
        manifest = parse_stored(content)
        if reason := _distrusted(manifest, signature, policy):
            found.append((manifest.reference, reason))
    return found


def _distrusted(manifest: AdapterManifest, content: bytes | None, policy: TrustPolicy) -> str | None:
    """Why a policy that requires signatures refuses this version, or None."""
    if content is None:
        return "it is not signed, and the policy requires a trusted signature"
    if problem := signature_problem(manifest, content):
        return f"{problem}, and the policy requires a trusted signature"
    if signer_name(content, policy) is None:
        return "it is signed by a key that is not trusted here, and the policy requires a trusted signature"
    return None


def stored_signature(store: Store, manifest: AdapterManifest) -> bytes | None:
    """The signature file that a version has here."""
    key = (manifest.name, manifest.version)
    row = store.read().execute("SELECT signature FROM versions WHERE name = ? AND version = ?", key).fetchone()
    return row[0] if row else None


def keep_signature(store: Store, connection: sqlite3.Connection, manifest: AdapterManifest, content: bytes) -> None:
    """Put a signature beside a version that is here, in the place of the one it had."""
    write_durably(store.manifest_path(manifest.name, manifest.version).with_suffix(".sig"), content)
    connection.execute(
        "UPDATE versions SET signature = ? WHERE name = ? AND version = ?", (content, manifest.name, manifest.version)
    )


def signature_problem(manifest: AdapterManifest, content: bytes) -> str | None:
    """What is wrong with the bytes of a signature file for `manifest`, or None.

    A version that came from elsewhere may be signed as its publisher labelled it, or again here as it is called here.
    """
    try:
        if len(content) > ALLOWED_SIZES[SIGNATURE_FILE]:
            return f"{SIGNATURE_FILE} is too long"
        signature = Signature.model_validate_json(content)
    except ValidationError:
        return f"{SIGNATURE_FILE} is not a signature file"
    if signature.scheme == 1:
        return OLD_SCHEME
    valid = signature.verifies(manifest) or (manifest.origin is not None and signature.verifies(manifest.published()))
    return None if valid else f"{SIGNATURE_FILE} is not a signature over this manifest"


def signer_name(content: bytes, policy: TrustPolicy) -> str | None:
    """What the policy calls the key of a (valid) signature file; None where it does not know it."""
    key = Signature.model_validate_json(content).public_key
    return next((name for name, trusted in policy.keys.items() if trusted == key), None)


def generate_key(home: Path, name: str = "default") -> str:
    """Make a private key `keys/<name>.pem`, readable by its owner alone; returns the public key in hex.

    Raises:
        UsageError: not a name, or there is such a key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = _key_path(home, name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UsageError(f"There is a key {name!r} in {path.parent} already; give another name.") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    return key.public_key().public_bytes_raw().hex()


def sign_version(store: Store, manifest: AdapterManifest, key_name: str = "default") -> Signature:
    """Sign a version with the key `keys/<key_name>.pem`; a signature it had is replaced.

    Raises:
        UnknownNameError: no such key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = _key_path(store.home, key_name)
    if not path.is_file():
        raise UnknownNameError.among("key", key_name, sorted(found.stem for found in path.parent.glob("*.pem")))
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is not an Ed25519 key.")
    public_key = key.public_key().public_bytes_raw().hex()
    made = Signature(scheme=2, public_key=public_key, signature=key.sign(manifest.signed_bytes()).hex())
    content = (json.dumps(made.model_dump(), indent=1, sort_keys=True) + "\n").encode()
    with store.write() as connection:
        keep_signature(store, connection, manifest, content)
    return made


def verify_version(store: Store, manifest: AdapterManifest) -> str | None:
    """Check a version's signature and, against it, every byte of its files; returns the trusted signer's name or None.

    Raises:
        IntegrityError: not signed, the signature is wrong, or a file is not what was signed.
    """
    content = stored_signature(store, manifest)
    if content is None:
        raise IntegrityError(f"{manifest.reference}: it is not signed.")
    if problem := signature_problem(manifest, content):
        raise IntegrityError(f"{manifest.reference}: {problem}.")
    for filename, promised in manifest.files.items():
        if file_record(store.file(manifest, filename)) != promised:
            raise IntegrityError(f"{filename} of {manifest.reference} is not what was signed.")
    return signer_name(content, store.trust)


def _key_path(home: Path, name: str) -> Path:
    _check_key_name(name)
    return home / "keys" / f"{name}.pem"


def _check_key_name(name: str) -> None:
    if not is_name(name):
        raise UsageError(f"Wanted a name for the key of 1 to 64 letters, digits, '.', '_', '-'; got {name!r:.80}.")
