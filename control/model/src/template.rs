//! Templates: what VMs are made from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Millis, Name, PoolId, ProjectId, Refusal, TemplateId, Timestamp,
    storage::{Digest, Format},
};

/// What VMs are made from: boot files and a disk that overlays share. Its blobs never change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its id.
    pub id: TemplateId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its name, unique in the project.
    pub name: Name,
    /// What it holds.
    pub content: Content,
    /// Whether VMs can be made from it.
    pub state: TemplateState,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What a template holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Content {
    /// How its guests start.
    pub boot: Boot,
    /// The disk that its VMs' first volumes are overlays of.
    pub disk: Option<Disk>,
    /// Smallest memory its guests need, MiB.
    pub memory_mib_min: u64,
    /// How its guests learn who they are at their first start.
    #[serde(default)]
    pub seed: Seed,
}

/// How a guest learns its host name, its addresses and who may log in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Seed {
    /// Not at all; or by its kernel's command line, where the hypervisor loads that.
    #[default]
    None,
    /// From a small read-only disk that cloud-init finds by its label (its datasource NoCloud).
    NoCloud,
}

/// How a guest starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Boot {
    /// The hypervisor loads a kernel and an initial RAM disk.
    Direct {
        /// The kernel's blob.
        kernel: Blob,
        /// The initial RAM disk's blob.
        initrd: Blob,
        /// The kernel's command line; the VM's name and addresses are appended as `godwit.*` words.
        cmdline: String,
    },
    /// SeaBIOS starts from the first disk.
    Bios,
}

/// Bytes, by their digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Blob {
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// How many.
    pub size_bytes: u64,
}

/// How long fetching and vetting a template may take in all. A host gives up its own part before that.
pub const IMPORT_MAX: Millis = Millis::seconds(1800);

/// A template's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its file.
    pub blob: Blob,
    /// The file's format, as declared at import and checked.
    pub format: Format,
    /// Size that the guest sees, bytes.
    pub size_bytes: u64,
}

/// Whether VMs can be made from a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum TemplateState {
    /// A host fetches its blobs into a pool and vets them.
    Importing,
    /// Usable; its blobs are in these pools.
    Ready {
        /// Pools that hold all its blobs.
        pools: Vec<PoolId>,
        /// Pools into which hosts were told to fetch them: they may hold some.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        fetching: Vec<PoolId>,
    },
    /// Vetting or fetching failed.
    Failed {
        /// Why.
        reason: Refusal,
        /// The pool that may hold some of its blobs; absent where none was chosen, or by an older build.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pool: Option<PoolId>,
        /// Further pools that may.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        others: Vec<PoolId>,
    },
    /// Being deleted.
    Deleting,
}

impl TemplateState {
    /// The pools that hold all its blobs.
    #[must_use]
    pub fn holding(&self) -> &[PoolId] {
        match self {
            Self::Ready { pools, .. } => pools,
            _ => &[],
        }
    }

    /// The pools that may hold any of its blobs, as far as is known.
    pub fn touched(&self) -> impl Iterator<Item = PoolId> + '_ {
        let (first, more): (&[PoolId], &[PoolId]) = match self {
            Self::Ready { pools, fetching } => (pools, fetching),
            Self::Failed { pool, others, .. } => (pool.as_slice(), others),
            Self::Importing | Self::Deleting => (&[], &[]),
        };
        first.iter().chain(more).copied()
    }
}

impl Content {
    /// All blobs, in the order in which a host fetches them.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> + '_ {
        let boot = match &self.boot {
            Boot::Direct { kernel, initrd, .. } => [Some(*kernel), Some(*initrd)],
            Boot::Bios => [None, None],
        };
        boot.into_iter().flatten().chain(self.disk.map(|disk| disk.blob))
    }

    /// What all of them take in a pool, bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.blobs()
            .fold(0, |total: u64, blob| total.saturating_add(blob.size_bytes))
    }
}
