//! What hosts measure of themselves and of their VMs, and how people read it. It is shown and forgotten: never part of the world.
//!
//! Hosts send counters and levels, never rates: who reads two looks makes the rate, and a look that is lost costs no more than a point.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{HostId, Name, PoolId, Timestamp, VmId, query::Named};

/// One look of an agent at its host. It is sent once, and may be lost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Telemetry {
    /// The host's clock since its boot, ms: what rates are made with. Never compared with another host's.
    pub clock_ms: u64,
    /// The host.
    pub host: HostFigures,
    /// VMs with a process on this host.
    pub vms: Vec<VmFigures>,
}

/// What a host has used since its boot, and has now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFigures {
    /// CPUs.
    pub cpus: u32,
    /// How all CPUs together spent their time (proc_stat(5)).
    pub cpu: CpuTimes,
    /// Memory in all, bytes.
    pub memory_bytes: u64,
    /// Memory that new programs could have without swapping, bytes (`MemAvailable`, proc_meminfo(5)).
    pub memory_available_bytes: u64,
    /// For how long work waited.
    pub pressure: Pressure,
    /// Its storage pools.
    pub pools: Vec<PoolFigures>,
    /// Its links to other machines.
    pub uplinks: Vec<UplinkFigures>,
}

/// How CPUs spent their time, ms each since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuTimes {
    /// In programs, guests' time included.
    pub user_ms: u64,
    /// In the kernel, interrupts included.
    pub system_ms: u64,
    /// Idle.
    pub idle_ms: u64,
    /// Idle while a disk was waited for.
    pub iowait_ms: u64,
    /// Taken by a hypervisor below.
    pub steal_ms: u64,
}

impl CpuTimes {
    /// Time in which CPUs worked for this host, ms.
    #[must_use]
    pub const fn busy_ms(&self) -> u64 {
        self.user_ms.saturating_add(self.system_ms)
    }
}

/// Pressure stall information (Documentation/accounting/psi.rst). `None` where the kernel does not tell, which is not 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pressure {
    /// For CPUs.
    pub cpu: Option<Stall>,
    /// For memory.
    pub memory: Option<Stall>,
    /// For disks.
    pub io: Option<Stall>,
}

/// For how long work has waited for one resource, microseconds since boot, or since the group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stall {
    /// Some of it waited.
    pub some_us: u64,
    /// All of it waited; `None` where the kernel does not tell.
    pub full_us: Option<u64>,
}

/// A storage pool as a host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolFigures {
    /// Its id.
    pub pool: PoolId,
    /// Its name here.
    pub name: Name,
    /// Bytes in all; 0 while they are not known.
    #[serde(default)]
    pub capacity_bytes: u64,
    /// Bytes free.
    #[serde(default)]
    pub free_bytes: u64,
    /// What the device below it did; `None` where it lies on none of this host.
    #[serde(default)]
    pub device: Option<DeviceFigures>,
}

/// What a block device of a host has done since boot (Documentation/admin-guide/iostats.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceFigures {
    /// Its transfers.
    #[serde(flatten)]
    pub disk: DiskFigures,
    /// Time in which it was busy, ms.
    pub busy_ms: u64,
}

/// What went from and to disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskFigures {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// A link of a host to other machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UplinkFigures {
    /// The interface's name.
    pub name: String,
    /// What went through it, from the host's point of view.
    #[serde(flatten)]
    pub network: NetworkFigures,
}

/// What went through a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkFigures {
    /// Bytes that were received.
    pub received_bytes: u64,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Frames to be received that were dropped.
    pub received_dropped: u64,
    /// Frames to be sent that were dropped.
    pub sent_dropped: u64,
}

/// What a VM's process has used since it was started on this host, and has now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFigures {
    /// The VM.
    pub vm: VmId,
    /// Tells this process from an earlier one of the VM here, whose counters were others: clock ticks from boot to its start.
    #[serde(default)]
    pub started_ticks: u64,
    /// CPU time of all its threads, ms: of the guest, and of what serves it.
    #[serde(default)]
    pub cpu_ms: u64,
    /// For how long its threads were ready and had no CPU, ms; `None` where the kernel does not tell.
    #[serde(default)]
    pub cpu_wait_ms: Option<u64>,
    /// Host memory that it has, bytes: what is shared with others counts in full.
    #[serde(default)]
    pub memory_bytes: u64,
    /// What the guest read and wrote; `None` while it is moved.
    #[serde(default)]
    pub disk: Option<DiskFigures>,
    /// What went through its ports, from the guest's point of view.
    #[serde(default)]
    pub network: NetworkFigures,
    /// For how long it waited, where its process has a control group of its own.
    #[serde(default)]
    pub pressure: Pressure,
}

impl Telemetry {
    /// Most VMs of a look.
    pub const VMS_MAX: usize = 8192;
    /// Most pools, and most uplinks, of a look.
    pub const PARTS_MAX: usize = 32;
    /// Longest name of an uplink, bytes (`IFNAMSIZ`).
    const UPLINK_NAME_MAX: usize = 15;

    /// Whether it is within the bounds of what is kept; one that is not is dropped whole.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_graphic();
        let named = |uplink: &UplinkFigures| {
            (1..=Self::UPLINK_NAME_MAX).contains(&uplink.name.len()) && uplink.name.bytes().all(plain)
        };
        self.vms.len() <= Self::VMS_MAX
            && self.host.pools.len() <= Self::PARTS_MAX
            && self.host.uplinks.len() <= Self::PARTS_MAX
            && self.host.uplinks.iter().all(named)
    }
}

/// Points in time of one thing, and of its parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SeriesView {
    /// Its id.
    pub id: uuid::Uuid,
    /// Its name.
    pub name: Name,
    /// The beginning of the first point.
    pub from: Timestamp,
    /// The end of the last point.
    pub until: Timestamp,
    /// From one point to the next, seconds. Each point is the mean over this time.
    pub step_s: u32,
    /// Itself, and for a host its pools and uplinks.
    pub parts: Vec<PartSeries>,
    /// Where the next page begins; `None` when there is none.
    pub next: Option<Timestamp>,
}

/// The series of a thing or a part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PartSeries {
    /// `vm`, `host`, `pool` or `uplink`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its series by their names, which end in their units; `null` where nothing was measured.
    pub series: BTreeMap<String, Vec<Option<f32>>>,
}

/// What a VM uses now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmReading {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Where it is.
    pub host: Option<Named<HostId>>,
    /// Its state.
    pub state: crate::VmState,
    /// Its vCPUs.
    pub vcpus: u16,
    /// Its memory as the guest sees it, bytes.
    pub memory_size_bytes: u64,
    /// What was measured last.
    #[serde(flatten)]
    pub reading: Reading,
}

/// What a host uses now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostReading {
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: Name,
    /// Whether its agent is connected.
    pub connected: bool,
    /// Its CPUs.
    pub cpus: u32,
    /// Its memory, bytes.
    pub memory_size_bytes: u64,
    /// VMs that hold capacity on it.
    pub vms: u64,
    /// What was measured last.
    #[serde(flatten)]
    pub reading: Reading,
}

/// What was measured last.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Reading {
    /// When; `None`: not within the last minute, and there are no figures.
    pub at: Option<Timestamp>,
    /// Figures by their names, which end in their units; those that were not measured are absent.
    #[serde(default)]
    pub figures: BTreeMap<String, f32>,
    /// The last points of each, the newest last, 10 s apart; `null` where nothing was measured. Empty unless it was asked for.
    #[serde(default)]
    pub history: BTreeMap<String, Vec<Option<f32>>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_or_has_names_that_no_interface_has_is_out_of_bounds() {
        let named = |name: &str| {
            let uplinks = vec![UplinkFigures {
                name: name.to_owned(),
                ..UplinkFigures::default()
            }];
            let host = HostFigures {
                uplinks,
                ..HostFigures::default()
            };
            Telemetry {
                host,
                ..Telemetry::default()
            }
        };
        assert!(Telemetry::default().is_bounded());
        assert!(named("eth0").is_bounded());
        for bad in ["", "a b", "\u{1b}[2J", "sixteen-bytes-xx"] {
            assert!(!named(bad).is_bounded(), "{bad:?}");
        }
        let many = vec![UplinkFigures::default(); Telemetry::PARTS_MAX + 1];
        let mut telemetry = Telemetry::default();
        telemetry.host.uplinks = many;
        assert!(!telemetry.is_bounded());
    }

    #[test]
    fn a_look_of_another_version_is_read_as_far_as_it_goes() {
        let read: Telemetry = serde_json::from_str(r#"{"clock_ms":7,"mood":"good","host":{"cpus":2}}"#).unwrap();
        assert_eq!((read.clock_ms, read.host.cpus), (7, 2));
        assert_eq!(read.host.pressure.cpu, None);
    }
}
