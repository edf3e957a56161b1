//! Storage: pools, volumes, and the digests of blobs. VMs refer to volumes, never to paths.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use crate::{Generation, HostId, Name, PoolId, ProjectId, VmId, VolumeId};

/// A place for volumes and blobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// The id in its token file.
    pub id: PoolId,
    /// Its name, unique in the cell.
    pub name: Name,
    /// How it is reached.
    pub driver: PoolDriver,
    /// Hosts that have shown that they see it. More than one: shared.
    pub hosts: BTreeSet<HostId>,
    /// Hosts of a pool fail together with it: a label for placement apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_domain: Option<String>,
}

impl Pool {
    /// Whether volumes here survive, and can be reached without, any one host.
    #[must_use]
    pub fn scope(&self) -> PoolScope {
        if self.hosts.len() > 1 {
            PoolScope::Shared
        } else {
            PoolScope::Host
        }
    }
}

/// How a pool is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolDriver {
    /// A directory, of the host's own or mounted on several.
    Dir,
}

/// Who reaches a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolScope {
    /// One host.
    Host,
    /// Several hosts.
    Shared,
}

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its id; its file is named after it.
    pub id: VolumeId,
    /// Whose it is.
    pub project: ProjectId,
    /// Where it lies.
    pub pool: PoolId,
    /// Its format, recorded and always passed on: never probed from what a guest may have written.
    pub format: Format,
    /// Size that the guest sees, bytes.
    pub size_bytes: u64,
    /// The blob it is a copy-on-write overlay of; `None` is blank.
    pub base: Option<Digest>,
    /// The VM that has it.
    pub owner: Option<VmId>,
    /// Its owner's generation when it last changed hands.
    pub generation: Generation,
}

/// Format of a volume's or image's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// QEMU's copy-on-write format.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl Format {
    /// As QEMU names it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// SHA-256 of a blob's bytes; also its file name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[0-9a-f]{64}$")]
pub struct Digest(pub [u8; 32]);

/// A text that is no [`Digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a digest is 64 lower-case hexadecimal digits (SHA-256)")]
pub struct DigestError;

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.as_bytes();
        if bytes.len() != 64 || !bytes.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(DigestError);
        }
        let nibble = |b: u8| if b <= b'9' { b - b'0' } else { b - b'a' + 10 };
        let mut digest = [0; 32];
        for (out, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
            *out = nibble(pair[0]) << 4 | nibble(pair[1]);
        }
        Ok(Self(digest))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        let mut text = String::with_capacity(64);
        for byte in digest.0 {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_digest_reads_back_from_its_text(bytes in any::<[u8; 32]>()) {
            prop_assert_eq!(Digest(bytes).to_string().parse::<Digest>(), Ok(Digest(bytes)));
        }

        #[test]
        fn any_other_text_is_refused(text in "[^0-9a-f]{1,64}|[0-9a-f]{0,63}|[0-9a-f]{65,80}") {
            prop_assert!(text.parse::<Digest>().is_err());
        }
    }
}
