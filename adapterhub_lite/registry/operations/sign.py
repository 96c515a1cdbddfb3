"""Ed25519 signatures over manifests, and the policy that says whose are wanted. Keys lie in `keys/` of a home folder.

A signature covers the manifest without its local labels (name and version), and through the files' sha256 every byte.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES
from adapterhub_lite.adapter_format.manifest import SIGNATURE_FILE, AdapterManifest, HexDigest
from adapterhub_lite.adapter_format.record import StrictModel
from adapterhub_lite.adapter_format.reference import is_name
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, UnknownNameError, UsageError
from adapterhub_lite.registry.store.files import file_record, write_durably
from adapterhub_lite.registry.store.store import TRUST_FILE, Store, TrustPolicy


class Signature(StrictModel):
    """The content of `adapterhub.sig.json`; both keys and signature in hex."""

    algorithm: Literal["ed25519"] = "ed25519"
    public_key: HexDigest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def verifies(self, manifest: AdapterManifest) -> bool:
        """Whether it is a signature over this manifest by the key it names."""
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

    def _write(self, policy: TrustPolicy) -> None:
        write_durably(self._store.home / TRUST_FILE, (policy.model_dump_json(indent=1) + "\n").encode())


def incoming_signature(manifest: AdapterManifest, folder: Path, policy: TrustPolicy) -> bytes | None:
    """The signature file in `folder` (None: there is none), once it satisfies the policy.

    Raises:
        IntegrityError: it is not a signature of this manifest.
        AdapterRejectedError: a trusted one is required, and this is none.
    """
    path = folder / SIGNATURE_FILE
    content = path.read_bytes() if path.is_file() else None
    if content is not None and (problem := signature_problem(manifest, content)):
        raise IntegrityError(f"{manifest.reference}: {problem}.")
    if policy.required and signer_name(content, policy) is None:
        reason = "it is not signed" if content is None else "it is signed by a key that is not trusted here"
        raise AdapterRejectedError(f"The adapter {manifest.reference}", [f"{reason}, and the policy wants that"])
    return content


def signature_problem(manifest: AdapterManifest, content: bytes) -> str | None:
    """What is wrong with the bytes of a signature file for `manifest`, or None."""
    try:
        if len(content) > ALLOWED_SIZES[SIGNATURE_FILE]:
            return f"{SIGNATURE_FILE} is too long"
        valid = Signature.model_validate_json(content).verifies(manifest)
    except ValidationError:
        return f"{SIGNATURE_FILE} is not a signature file"
    return None if valid else f"{SIGNATURE_FILE} is not a signature over this manifest"


def signer_name(content: bytes | None, policy: TrustPolicy) -> str | None:
    """What the policy calls the key of a (valid) signature file; None where it knows it not, or there is no file."""
    if content is None:
        return None
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
    made = Signature(public_key=public_key, signature=key.sign(manifest.signed_bytes()).hex())
    content = (json.dumps(made.model_dump(), indent=1, sort_keys=True) + "\n").encode()
    with store.write() as connection:
        write_durably(store.manifest_path(manifest.name, manifest.version).with_suffix(".sig"), content)
        connection.execute(
            "UPDATE versions SET signature = ? WHERE name = ? AND version = ?",
            (content, manifest.name, manifest.version),
        )
    return made


def verify_version(store: Store, manifest: AdapterManifest) -> str | None:
    """Check a version's signature and, against it, every byte of its files; returns the trusted signer's name or None.

    Raises:
        IntegrityError: not signed, the signature is wrong, or a file is not what was signed.
    """
    row = store.read().execute(
        "SELECT signature FROM versions WHERE name = ? AND version = ?", (manifest.name, manifest.version)
    )
    content = row.fetchone()[0]
    problem = "it is not signed" if content is None else signature_problem(manifest, content)
    if problem:
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
