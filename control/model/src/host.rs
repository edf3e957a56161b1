//! Hosts: what people decide about them, and what their agents report.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{BootId, HostId, Name, PoolId, Timestamp, layout::Family};

/// A machine of the pool on which an agent runs VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The id in its certificate.
    pub id: HostId,
    /// Its name, unique in the cell. Renaming is free.
    pub name: Name,
    /// What people decided.
    #[serde(default)]
    pub spec: HostSpec,
    /// What was last seen.
    pub status: HostStatus,
    /// When it joined.
    pub joined_at: Timestamp,
}

/// What people decide about a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostSpec {
    /// Whether new VMs may come here.
    pub schedulable: bool,
    /// vCPUs offered for each CPU, in percent: 400 lets 4 vCPUs share a CPU.
    pub cpu_percent: u32,
    /// Memory offered to VMs, in percent of what the host has. Above 100 over-commits.
    pub memory_percent: u32,
}

impl Default for HostSpec {
    fn default() -> Self {
        Self {
            schedulable: true,
            cpu_percent: 400,
            memory_percent: 90,
        }
    }
}

/// What is known of a host now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostStatus {
    /// Whether its agent is connected.
    pub link: Link,
    /// Since when.
    pub since: Timestamp,
    /// What its agent last said of it; `None` until it connects for the first time.
    pub facts: Option<HostFacts>,
}

/// Whether a host's agent is connected. A lost host is an alarm: nothing is restarted elsewhere by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// Connected, and its VMs are known.
    Up,
    /// Not connected; its VMs may well run.
    Lost,
}

/// What an agent says of its host when it connects, and when it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostFacts {
    /// This boot of its kernel.
    pub boot: BootId,
    /// Where other hosts reach it for migrations.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Port of its agent for other agents.
    pub peer_port: u16,
    /// CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Its hypervisor.
    pub hypervisor: Hypervisor,
    /// Storage pools it reaches.
    pub pools: Vec<PoolFacts>,
    /// Version of its agent.
    pub agent_version: String,
}

/// What a host's hypervisor offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Hypervisor {
    /// `qemu`.
    pub kind: String,
    /// Its version, as it prints it: `10.0.2`.
    pub version: String,
    /// How guests' instructions are run.
    pub accelerator: Accelerator,
    /// Why that accelerator, for people.
    pub accelerator_reason: String,
    /// The newest exact machine type of each family: `pc-q35-7.2`.
    pub machines: BTreeMap<Family, String>,
    /// All exact machine types it can run.
    pub machine_types: BTreeSet<String>,
    /// Migration capabilities it knows.
    pub migration: BTreeSet<String>,
}

/// How guests' instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// By the CPU (KVM).
    Kvm,
    /// By emulation (QEMU's TCG). No security boundary, says QEMU.
    Tcg,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A storage pool as one host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolFacts {
    /// The id in the pool's token file.
    pub id: PoolId,
    /// The name that this host's configuration gives it.
    pub name: Name,
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Bytes free now.
    pub free_bytes: u64,
    /// Since when its file system does not answer, by the host's clock; the figures are the last that were known, or 0. Absent while
    /// it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_since: Option<Timestamp>,
}
