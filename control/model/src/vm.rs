//! Virtual machines: what people asked for, and what is seen.
//!
//! ```text
//!            create              start                      migrate
//!  (nothing) ─────▶ provisioning ────▶ active ◀───────────────────────▶ migrating
//!                     │     ▲          │ ▲  ▲                              ▲ │
//!               fails │     │    pause │ │  │ resume a suspended one       │ │ (a paused one
//!                     ▼     │          ▼ │  │                              ▼ │  arrives paused)
//!                  failed   │        paused │        suspended           paused
//!                     │     │          │    │            ▲
//!                     │     │ start    │ stop, kill,     │ suspend (saved to disk, memory released)
//!                     │     │          ▼ guest off       │
//!                     └─────┴────── inactive ◀───────────┘ stop
//!            create --no-start ───────▶│
//!                                      │ delete
//!                                      ▼
//!                                  (nothing)
//! ```
//!
//! *Seen* and *asked for* are apart: a lost host changes neither; it is an alarm at the host.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Generation, HostId, Name, OperationId, PortId, ProjectId, Revision, TemplateId, Terms, Timestamp, VmId, VolumeId,
    layout::{Family, Layout},
};

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its id, also its SMBIOS UUID.
    pub id: VmId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its name, unique in the project.
    pub name: Name,
    /// What people asked for.
    pub spec: VmSpec,
    /// Counts the changes of `spec`; what If-Match compares.
    pub revision: Revision,
    /// Its exact hardware, fixed when it was first placed.
    pub layout: Layout,
    /// Its ports, in the order of its network cards.
    pub ports: Vec<PortId>,
    /// Its volumes, in the order of its disks.
    pub volumes: Vec<VolumeId>,
    /// What is seen.
    pub status: VmStatus,
    /// The one operation that holds it, if any.
    pub operation: Option<OperationId>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What people asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSpec {
    /// What it was made from.
    pub template: TemplateId,
    /// vCPUs.
    pub vcpus: u16,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Machine family.
    #[serde(default)]
    pub family: Family,
    /// Whether it should run.
    pub power: Power,
}

/// Whether a VM should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// It runs.
    On,
    /// It is held in memory and stands.
    Paused,
    /// It does not exist on any host, but for its disks.
    Off,
}

/// What is seen of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStatus {
    /// Its state.
    pub state: VmState,
    /// Since when.
    pub since: Timestamp,
    /// Why it is in that state, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The host that holds it or, when it is off, held it last.
    pub host: Option<HostId>,
    /// The generation under which that host holds it.
    pub generation: Generation,
    /// The highest generation that was ever reserved for it. The next is above.
    pub highest: Generation,
    /// The newest order about it.
    pub ordered: Revision,
    /// The newest order that a host has answered.
    pub observed: Revision,
    /// The terms under which it is being moved, stored before its guest can stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Terms>,
    /// Hosts of those terms on which, by their own word or by a reboot, nothing of it is left. It may be started anew, or moved
    /// again, only when the other copy is known to be gone.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub cleared: BTreeSet<HostId>,
}

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// A host makes its disks and starts it.
    Provisioning,
    /// Off; its disks are kept.
    Inactive,
    /// Runs.
    Active,
    /// Held in memory, stands.
    Paused,
    /// Saved to disk, stands.
    Suspended,
    /// Runs and moves.
    Migrating,
    /// Could not be provisioned, or its last start failed.
    Failed,
}

impl VmState {
    /// Whether it takes memory and CPU of its host.
    #[must_use]
    pub const fn holds_capacity(self) -> bool {
        matches!(self, Self::Provisioning | Self::Active | Self::Paused | Self::Migrating)
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Provisioning => "provisioning",
            Self::Inactive => "inactive",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Migrating => "migrating",
            Self::Failed => "failed",
        })
    }
}
