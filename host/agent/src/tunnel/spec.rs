//! What a tunnel process is told: a JSON file that only its owner can read.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::secret_file::{self, ReadSecretError, WriteSecretError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// The version of [`TunnelSpec`] and [`super::TunnelStatus`] that this build writes.
pub const VERSION: u32 = 1;

const SPEC_BYTES_MAX: u64 = 64 * 1024;

/// All that one side of one migration's tunnel needs to know. The agent writes it; an agent of a later version may find
/// the tunnel still running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelSpec {
    /// [`VERSION`].
    pub version: u32,
    /// This tunnel's own directory (0700): it holds `spec.json`, `status.json` and `tunnel.log`.
    pub directory: PathBuf,
    /// This host's identity file.
    pub identity: PathBuf,
    /// The id of the host at the other end.
    pub peer: Uuid,
    /// The migration's one-time token, the same on both sides.
    pub token: Token,
    /// Which side this is.
    pub side: Side,
    /// The first authenticated connection must be made within this time, in milliseconds.
    pub connect_ms_max: u64,
    /// From then, the migration must begin within this time, in milliseconds.
    pub begin_ms_max: u64,
    /// A peer whose kernel acknowledges nothing for this time, in milliseconds, is dead.
    pub silence_ms_max: u64,
}

/// One end of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "side", rename_all = "snake_case")]
pub enum Side {
    /// Where the VM comes from: QEMU's `migrate unix:PATH` connects to us, and we to the other host.
    Source {
        /// The Unix socket to listen on. A stale one is replaced.
        listen: PathBuf,
        /// The destination's tunnel.
        peer_address: SocketAddr,
        /// Whether the stream flows only while an agent says so at [`TunnelSpec::leash_path`].
        #[serde(default)]
        leash: bool,
    },
    /// Where it goes: the other host connects to us, and we to QEMU's `-incoming unix:PATH`.
    Destination {
        /// The address of this host in the migration network; port 0 takes a free one, which the status then says.
        listen: SocketAddr,
        /// QEMU's socket.
        incoming: PathBuf,
    },
}

/// Why a spec is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read, or others can read it.
    #[error("the tunnel's specification cannot be used")]
    Read(#[from] ReadSecretError),
    /// It cannot be written.
    #[error("the tunnel's specification was not saved")]
    Write(#[from] WriteSecretError),
    /// Not the JSON of a spec.
    #[error("the tunnel's specification is malformed")]
    Malformed(#[from] serde_json::Error),
    /// Of another version.
    #[error("the tunnel's specification has version {0}; this godwit reads {VERSION}")]
    Version(u32),
}

impl TunnelSpec {
    /// Reads a spec from a private file, which may be an inherited descriptor (`/proc/self/fd/N`) of one.
    pub fn read(path: &Path) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_slice(&secret_file::read(path, SPEC_BYTES_MAX)?)?;
        match spec.version {
            VERSION => Ok(spec),
            other => Err(SpecError::Version(other)),
        }
    }

    /// Makes the tunnel's directory and writes the spec there (0600); returns its path.
    pub fn write(&self) -> Result<PathBuf, SpecError> {
        secret_file::private_directory(&self.directory)?;
        let path = self.directory.join("spec.json");
        secret_file::replace(&path, &serde_json::to_vec_pretty(self)?)?;
        Ok(path)
    }

    /// Where the tunnel says how it is.
    #[must_use]
    pub fn status_path(&self) -> PathBuf {
        self.directory.join("status.json")
    }

    /// Where the agent of a source says whether the stream may flow.
    #[must_use]
    pub fn leash_path(&self) -> PathBuf {
        self.directory.join("leash")
    }

    pub(super) fn connect_max(&self) -> Duration {
        Duration::from_millis(self.connect_ms_max)
    }

    pub(super) fn begin_max(&self) -> Duration {
        Duration::from_millis(self.begin_ms_max)
    }

    pub(super) fn silence_max(&self) -> Duration {
        Duration::from_millis(self.silence_ms_max)
    }
}

/// A migration's one-time secret: 32 random bytes, hexadecimal in JSON, never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token([u8; Token::BYTES]);

impl Token {
    /// Its length.
    pub const BYTES: usize = 32;

    /// Takes random bytes, from [`identity::random`].
    #[must_use]
    pub fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    pub(super) fn expose(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Constant-time comparison.
    #[must_use]
    pub fn matches(&self, given: &[u8; Self::BYTES]) -> bool {
        identity::same_secret(&self.0, given)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Token(secret)")
    }
}

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The same 64 digits that a fingerprint has.
        serializer.collect_str(&identity::Fingerprint(self.0))
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digits = String::deserialize(deserializer)?;
        let bytes: identity::Fingerprint = digits
            .parse()
            .map_err(|_| serde::de::Error::custom("a token is 64 hexadecimal digits"))?;
        Ok(Self(bytes.0))
    }
}
