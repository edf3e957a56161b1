//! A VM's exact hardware, fixed when it is first placed: an argument vector made anew after an upgrade breaks migration.
//!
//! Source: QEMU's `docs/specs/pci-ids.rst` and `docs/pcie.txt`; addresses were chosen so that both machine families use the same
//! slot numbers and leave room for what is plugged later.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    PortId, VolumeId,
    host::{Accelerator, Hypervisor},
};

/// A family of emulated machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// PCI Express (Intel Q35).
    #[default]
    Q35,
    /// PCI (Intel 440FX).
    Pc,
}

impl Family {
    /// QEMU's alias for the newest machine type of the family.
    #[must_use]
    pub const fn alias(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }

    /// The bus that devices sit on.
    const fn bus(self) -> &'static str {
        match self {
            Self::Q35 => "pcie.0",
            Self::Pc => "pci.0",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.alias())
    }
}

/// A VM's exact hardware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Layout {
    /// Form of this record: 1, or 2 with a seed. A driver refuses a version it does not know.
    pub version: u16,
    /// Its machine family.
    pub family: Family,
    /// Its exact machine type: `pc-q35-7.2`.
    pub machine: String,
    /// How its instructions are run. Fixed: the two do not migrate into each other.
    pub accelerator: Accelerator,
    /// CPU model, in QEMU's words.
    pub cpu: String,
    /// vCPUs.
    pub vcpus: u16,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Its devices, each at its address.
    pub devices: Vec<Device>,
    /// Where the disk sits that tells the guest who it is; `None` where it gets none. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<SeedDevice>,
}

/// Where the disk sits that tells a guest who it is: virtio, read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SeedDevice {
    /// The bus it sits on: `pcie.0`.
    pub bus: String,
    /// Its slot there, 1 to 31.
    pub slot: u8,
}

/// A device at its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// Its id within the VM: `net0`.
    pub id: String,
    /// The bus it sits on: `pcie.0`.
    pub bus: String,
    /// Its slot there, 1 to 31.
    pub slot: u8,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is. All are virtio on PCI: fewest registers to save and load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum DeviceKind {
    /// A network card.
    Net {
        /// Its port.
        port: PortId,
    },
    /// A disk.
    Disk {
        /// Its volume.
        volume: VolumeId,
    },
}

impl Layout {
    /// The newest version of this record.
    pub const VERSION: u16 = 2;
    /// The version that is written where nothing newer is needed: hosts of before know it.
    const PLAIN: u16 = 1;

    /// Slot of the first network card; up to 8 follow.
    const NET_SLOT: u8 = 2;
    /// Slot of the first disk; up to 16 follow.
    const DISK_SLOT: u8 = 10;
    /// Slot of the seed's disk: after the last disk, so that it is never a guest's first.
    const SEED_SLOT: u8 = 26;
    /// Most network cards of a VM.
    pub const PORTS_MAX: usize = 8;
    /// Most disks of a VM.
    pub const VOLUMES_MAX: usize = 16;

    /// Fixes the hardware of a VM for a hypervisor. `None` when the hypervisor has no machine of the family.
    ///
    /// At most [`Self::PORTS_MAX`] ports and [`Self::VOLUMES_MAX`] volumes are laid out.
    #[must_use]
    pub fn fix(
        family: Family,
        hypervisor: &Hypervisor,
        vcpus: u16,
        memory_mib: u64,
        ports: &[PortId],
        volumes: &[VolumeId],
    ) -> Option<Self> {
        let machine = hypervisor.machines.get(&family)?.clone();
        let device = |prefix: &str, index: usize, first: u8, kind: DeviceKind| Device {
            id: format!("{prefix}{index}"),
            bus: family.bus().to_owned(),
            slot: first + u8::try_from(index).unwrap_or(u8::MAX - first),
            kind,
        };
        let nets = ports.iter().take(Self::PORTS_MAX).enumerate();
        let disks = volumes.iter().take(Self::VOLUMES_MAX).enumerate();
        let devices = nets
            .map(|(i, &port)| device("net", i, Self::NET_SLOT, DeviceKind::Net { port }))
            .chain(disks.map(|(i, &volume)| device("disk", i, Self::DISK_SLOT, DeviceKind::Disk { volume })))
            .collect();
        // The oldest models that every host of that kind has: a move must not fail on the CPU.
        let cpu = match hypervisor.accelerator {
            Accelerator::Kvm => "Nehalem",
            Accelerator::Tcg => "qemu64",
        };
        Some(Self {
            version: Self::PLAIN,
            family,
            machine,
            accelerator: hypervisor.accelerator,
            cpu: cpu.to_owned(),
            vcpus,
            memory_mib,
            devices,
            seed: None,
        })
    }

    /// The same with a disk that tells the guest who it is.
    #[must_use]
    pub fn with_seed(self) -> Self {
        let seed = SeedDevice {
            bus: self.family.bus().to_owned(),
            slot: Self::SEED_SLOT,
        };
        Self {
            version: Self::VERSION,
            seed: Some(seed),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use uuid::Uuid;

    use super::*;

    fn fixed() -> Layout {
        let hypervisor = Hypervisor {
            kind: "qemu".to_owned(),
            version: "7.2".to_owned(),
            accelerator: Accelerator::Tcg,
            accelerator_reason: String::new(),
            machines: BTreeMap::from([(Family::Q35, "pc-q35-7.2".to_owned())]),
            machine_types: BTreeSet::new(),
            migration: BTreeSet::new(),
        };
        let (port, volume) = (PortId(Uuid::from_u128(1)), VolumeId(Uuid::from_u128(2)));
        Layout::fix(Family::Q35, &hypervisor, 2, 512, &[port], &[volume]).unwrap()
    }

    /// What VMs that run were built from. These bytes never change.
    #[test]
    fn stored_layouts_of_each_version_are_read_and_written_as_they_are() {
        for (text, layout) in [
            (include_str!("../fixtures/layout-v1.json"), fixed()),
            (include_str!("../fixtures/layout-v2.json"), fixed().with_seed()),
        ] {
            assert_eq!(serde_json::from_str::<Layout>(text).unwrap(), layout);
            let stored: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_value(&layout).unwrap(), stored);
        }
    }
}
