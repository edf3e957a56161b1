//! The argument vector of a VM, from its stored definition alone.
//!
//! All that shapes what the guest sees comes from [`model::layout::Layout`], which is fixed for the VM's life; what this file adds
//! to it is tied to [`Layout::VERSION`]. Changing either under a running VM breaks its migration: a new form needs a new version.
//!
//! QEMU opens no path but its own firmware: everything comes as a descriptor that it inherits.

use std::fmt::Write as _;
use std::os::fd::RawFd;

use driver::Mode;
use model::Definition;
use model::addressing::AddressingMethod;
use model::host::Accelerator;
use model::layout::{Device, DeviceKind, Family, Layout};
use model::order::{PortUse, VolumeUse};
use model::template::Boot;
use serde_json::{Value, json};

use crate::capability::SANDBOX;

/// The descriptor set of the seed: after those of all disks and their bases.
const SEED_SET: usize = 2 * Layout::VOLUMES_MAX;

/// What of a definition cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgvError {
    /// It was written by a newer Godwit.
    #[error("the VM's hardware is recorded in form {0}, and this agent knows form {known}: upgrade it", known = Layout::VERSION)]
    Version(u16),
    /// A word that QEMU would take for something else.
    #[error("{field} {value:?} is no name of QEMU's")]
    Word {
        /// Which.
        field: &'static str,
        /// The word.
        value: String,
    },
    /// The layout has a device whose port or volume the definition lacks, or the reverse.
    #[error("the VM's layout and definition do not agree: {0}")]
    Disagree(String),
}

/// The numbers of the descriptors that QEMU inherits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Descriptors {
    /// Listening socket of the monitor.
    pub(crate) monitor: RawFd,
    /// Listening socket of the serial console.
    pub(crate) serial: RawFd,
    /// Taps, in the order of the definition's ports.
    pub(crate) taps: Vec<RawFd>,
    /// Disks, in the order of the definition's volumes.
    pub(crate) disks: Vec<DiskDescriptors>,
    /// Kernel and initial RAM disk.
    pub(crate) boot: Option<(RawFd, RawFd)>,
    /// The disk that tells the guest who it is, to read.
    pub(crate) seed: Option<RawFd>,
}

/// A disk's descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskDescriptors {
    /// The volume, to read and write; and to read, since QEMU opens it so at first.
    pub(crate) volume: [RawFd; 2],
    /// Its base, to read.
    pub(crate) base: Option<RawFd>,
}

/// The arguments after the program's own.
pub(crate) fn argv(
    definition: &Definition,
    mode: Mode,
    sandbox: bool,
    descriptors: &Descriptors,
) -> Result<Vec<String>, ArgvError> {
    let layout = &definition.layout;
    if !matches!(layout.version, 1 | Layout::VERSION) {
        return Err(ArgvError::Version(layout.version));
    }
    let mut argv = Argv::default();
    argv.machine(definition)?;
    argv.flags(&["-nodefaults", "-no-user-config", "-S"]);
    argv.options(&[("-display", "none".to_owned()), ("-vga", "none".to_owned())]);
    if sandbox {
        argv.option("-sandbox", SANDBOX);
    }
    argv.sockets(descriptors);
    for device in &layout.devices {
        match device.kind {
            DeviceKind::Disk { volume } => {
                let at = definition.volumes.iter().position(|used| used.place.volume == volume);
                let found = at.and_then(|at| Some((at, definition.volumes.get(at)?, descriptors.disks.get(at)?)));
                let (at, used, disk) = found.ok_or_else(|| disagree(device, "volume"))?;
                argv.disk(device, at, used, disk, definition.boot == Boot::Bios)?;
            }
            DeviceKind::Net { port } => {
                let at = definition.ports.iter().position(|used| used.port == port);
                let found = at.and_then(|at| Some((definition.ports.get(at)?, descriptors.taps.get(at)?)));
                let (used, tap) = found.ok_or_else(|| disagree(device, "port"))?;
                argv.card(device, used, *tap)?;
            }
        }
    }
    if layout.devices.len() != definition.volumes.len() + definition.ports.len() {
        return Err(ArgvError::Disagree(
            "the number of devices is not that of its ports and volumes".to_owned(),
        ));
    }
    argv.seed(layout, descriptors.seed)?;
    argv.boot(definition, descriptors)?;
    if mode == Mode::Wait {
        argv.option("-incoming", "defer");
    }
    Ok(argv.0)
}

#[derive(Default)]
struct Argv(Vec<String>);

impl Argv {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }

    fn options(&mut self, options: &[(&str, String)]) {
        options
            .iter()
            .for_each(|(option, value)| self.option(option, value.clone()));
    }

    fn machine(&mut self, definition: &Definition) -> Result<(), ArgvError> {
        let layout = &definition.layout;
        let machine = word("machine type", &layout.machine, "._-")?;
        let cpu = word("CPU model", &layout.cpu, "._-,+=")?;
        // Devices that a virtio guest has no use for: each has state to save and load inside the blackout.
        let without = match layout.family {
            Family::Q35 => "hpet=off,vmport=off,smbus=off,sata=off",
            Family::Pc => "hpet=off,vmport=off",
        };
        let accelerator = match layout.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        };
        let name = definition.name.to_string().replace(',', ",,");
        self.options(&[
            ("-name", format!("guest={name},debug-threads=on")),
            ("-uuid", definition.vm.to_string()),
            ("-machine", format!("{machine},{without}")),
            ("-accel", accelerator.to_owned()),
            ("-cpu", cpu.to_owned()),
            ("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", layout.vcpus)),
            ("-m", format!("size={}M", layout.memory_mib)),
            ("-rtc", "base=utc".to_owned()),
            ("-boot", "strict=on".to_owned()),
            ("-msg", "timestamp=on".to_owned()),
        ]);
        Ok(())
    }

    fn sockets(&mut self, descriptors: &Descriptors) {
        let listening = |id: &str, fd: RawFd| format!("socket,id={id},fd={fd},server=on,wait=off");
        self.options(&[
            ("-chardev", listening("monitor", descriptors.monitor)),
            ("-mon", "chardev=monitor,mode=control".to_owned()),
            ("-chardev", listening("serial", descriptors.serial)),
            ("-serial", "chardev:serial".to_owned()),
        ]);
    }

    fn disk(
        &mut self,
        device: &Device,
        at: usize,
        used: &VolumeUse,
        disk: &DiskDescriptors,
        boots: bool,
    ) -> Result<(), ArgvError> {
        let id = word("device id", &device.id, "-")?;
        // Formats are given, never probed: a guest could write the header of another.
        let base = match (&used.base, disk.base) {
            (None, None) => Value::Null,
            (Some(base), Some(fd)) => {
                let file = self.file(&format!("{id}-base-file"), 2 * at + 1, &[fd], true);
                let node = format!("{id}-base");
                // The base never changes, so the host's cache of it is right everywhere, and shared by its siblings.
                let block = json!({"driver": base.format.as_str(), "node-name": node, "file": file, "read-only": true});
                self.option(
                    "-blockdev",
                    backing(block, base.format.as_str(), Value::Null).to_string(),
                );
                node.into()
            }
            _ => return Err(ArgvError::Disagree(format!("the base of volume {}", used.place.volume))),
        };
        let file = self.file(&format!("{id}-file"), 2 * at, &disk.volume, false);
        let format = used.place.format.as_str();
        let cache = json!({"direct": true, "no-flush": false});
        let block = json!({
            "driver": format, "node-name": format!("{id}-format"), "file": file, "cache": cache, "discard": "unmap",
        });
        self.option("-blockdev", backing(block, format, base).to_string());
        let mut card = placed(device, "virtio-blk-pci")?;
        card["drive"] = format!("{id}-format").into();
        if boots && at == 0 {
            card["bootindex"] = 1.into();
        }
        self.option("-device", card.to_string());
        Ok(())
    }

    /// A file by descriptors: they form a set, of which QEMU takes the one opened the way it wants.
    fn file(&mut self, node: &str, set: usize, descriptors: &[RawFd], read_only: bool) -> String {
        for fd in descriptors {
            self.option("-add-fd", format!("fd={fd},set={set}"));
        }
        let block = json!({
            "driver": "file", "node-name": node, "filename": format!("/dev/fdset/{set}"), "read-only": read_only,
            "cache": {"direct": !read_only, "no-flush": false}, "discard": "unmap",
        });
        self.option("-blockdev", block.to_string());
        node.to_owned()
    }

    fn card(&mut self, device: &Device, used: &PortUse, tap: RawFd) -> Result<(), ArgvError> {
        let id = word("device id", &device.id, "-")?;
        self.option("-netdev", format!("tap,id={id}-tap,fd={tap}"));
        let mut card = placed(device, "virtio-net-pci")?;
        // The agents announce; and a guest that was asked to, and resets later, makes QEMU 7.2 crash (timer_del of nothing).
        card["guest_announce"] = false.into();
        card["netdev"] = format!("{id}-tap").into();
        card["mac"] = used.mac.to_string().into();
        // No boot ROM: nothing boots from the network, and its size differs between QEMUs.
        card["romfile"] = "".into();
        self.option("-device", card.to_string());
        Ok(())
    }

    /// Read-only, so that the guest cannot change what the next host reads; never booted from.
    fn seed(&mut self, layout: &Layout, seed: Option<RawFd>) -> Result<(), ArgvError> {
        let (place, fd) = match (&layout.seed, seed) {
            (None, None) => return Ok(()),
            (Some(place), Some(fd)) if layout.version > 1 => (place, fd),
            _ => {
                return Err(ArgvError::Disagree(
                    "the disk that tells the guest who it is".to_owned(),
                ));
            }
        };
        let bus = word("bus", &place.bus, "._-")?;
        let file = self.file("seed-file", SEED_SET, &[fd], true);
        let block = json!({"driver": "raw", "node-name": "seed-format", "file": file, "read-only": true});
        self.option("-blockdev", block.to_string());
        let card = json!({
            "driver": "virtio-blk-pci", "id": "seed", "bus": bus, "addr": format!("{:#x}", place.slot),
            "drive": "seed-format",
        });
        self.option("-device", card.to_string());
        Ok(())
    }

    fn boot(&mut self, definition: &Definition, descriptors: &Descriptors) -> Result<(), ArgvError> {
        match (&definition.boot, descriptors.boot) {
            (Boot::Bios, None) => {}
            (Boot::Direct { cmdline, .. }, Some((kernel, initrd))) => self.options(&[
                ("-kernel", format!("/proc/self/fd/{kernel}")),
                ("-initrd", format!("/proc/self/fd/{initrd}")),
                ("-append", guest_words(definition, cmdline)),
            ]),
            _ => return Err(ArgvError::Disagree("kernel and initial RAM disk".to_owned())),
        }
        Ok(())
    }
}

/// The kernel's command line, with what the guest should know of itself.
fn guest_words(definition: &Definition, cmdline: &str) -> String {
    let mut words = format!("{cmdline} godwit.name={}", definition.name);
    if let Some(port) = definition.ports.first() {
        // Writing to a String does not fail.
        if port.addressing.method == AddressingMethod::Dhcp {
            words.push_str(" godwit.ip=dhcp");
            return words;
        }
        let _ = write!(words, " godwit.ip={}/{} godwit.mtu={}", port.ip, port.prefix, port.mtu);
        if let Some(gateway) = port.gateway {
            let _ = write!(words, " godwit.gw={gateway}");
        }
    }
    words
}

/// Only some formats have backing files; those must be told when there is none, or they open what their header says.
fn backing(mut block: Value, format: &str, base: Value) -> Value {
    if format == "qcow2" {
        block["backing"] = base;
    }
    block
}

fn placed(device: &Device, kind: &str) -> Result<Value, ArgvError> {
    let bus = word("bus", &device.bus, "._-")?;
    Ok(json!({"driver": kind, "id": device.id, "bus": bus, "addr": format!("{:#x}", device.slot)}))
}

fn word<'a>(field: &'static str, value: &'a str, extra: &str) -> Result<&'a str, ArgvError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || extra.contains(c);
    if value.is_empty() || !value.chars().all(fits) {
        return Err(ArgvError::Word {
            field,
            value: value.to_owned(),
        });
    }
    Ok(value)
}

fn disagree(device: &Device, what: &str) -> ArgvError {
    ArgvError::Disagree(format!("device {} has no {what}", device.id))
}

#[cfg(test)]
mod tests {
    use model::layout::Family;
    use model::order::{VolumeBase, VolumePlace};
    use model::storage::{Digest, Format};
    use model::{Mac, PoolId, PortId, VmId, VolumeId};
    use uuid::Uuid;

    use super::*;

    fn definition(family: Family) -> Definition {
        let (port, volume, pool) = (
            PortId(Uuid::from_u128(1)),
            VolumeId(Uuid::from_u128(2)),
            PoolId(Uuid::from_u128(3)),
        );
        let (machine, bus) = match family {
            Family::Q35 => ("pc-q35-7.2", "pcie.0"),
            Family::Pc => ("pc-i440fx-7.2", "pci.0"),
        };
        let device = |id: &str, slot, kind| Device {
            id: id.to_owned(),
            bus: bus.to_owned(),
            slot,
            kind,
        };
        let layout = Layout {
            version: 1,
            family,
            machine: machine.to_owned(),
            accelerator: Accelerator::Tcg,
            cpu: "qemu64".to_owned(),
            vcpus: 2,
            memory_mib: 512,
            devices: vec![
                device("net0", 2, DeviceKind::Net { port }),
                device("disk0", 10, DeviceKind::Disk { volume }),
            ],
            seed: None,
        };
        let place = VolumePlace {
            volume,
            pool,
            format: Format::Qcow2,
        };
        let base = Some(VolumeBase {
            digest: Digest([0; 32]),
            format: Format::Raw,
        });
        Definition {
            template: None,
            vm: VmId(Uuid::from_u128(4)),
            name: "web1".parse().unwrap(),
            layout,
            boot: Boot::Bios,
            pool,
            volumes: vec![VolumeUse {
                place,
                size_bytes: 1 << 30,
                base,
            }],
            ports: vec![PortUse {
                port,
                mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
                ip: [10, 91, 0, 7].into(),
                prefix: 24,
                gateway: None,
                mtu: 1500,
                v6: None,
                addressing: model::addressing::Addressing::default(),
                policy: model::PortPolicy::default(),
            }],
        }
    }

    fn descriptors() -> Descriptors {
        Descriptors {
            monitor: 10,
            serial: 11,
            taps: vec![12],
            disks: vec![DiskDescriptors {
                volume: [13, 14],
                base: Some(15),
            }],
            boot: None,
            seed: None,
        }
    }

    /// Written down once, for good: a VM that was started by this form may have to move to a host whose agent is newer. A test
    /// that fails here asks for a new [`Layout::VERSION`], not for a new text.
    #[test]
    fn what_the_guest_sees_of_form_1_never_changes() {
        let built = argv(&definition(Family::Q35), Mode::Wait, true, &descriptors())
            .unwrap()
            .join(" ");
        let expected = concat!(
            "-name guest=web1,debug-threads=on -uuid 00000000-0000-0000-0000-000000000004 ",
            "-machine pc-q35-7.2,hpet=off,vmport=off,smbus=off,sata=off -accel tcg,thread=multi -cpu qemu64 ",
            "-smp cpus=2,sockets=1,cores=2,threads=1 -m size=512M -rtc base=utc -boot strict=on -msg timestamp=on ",
            "-nodefaults -no-user-config -S -display none -vga none ",
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny ",
            "-chardev socket,id=monitor,fd=10,server=on,wait=off -mon chardev=monitor,mode=control ",
            "-chardev socket,id=serial,fd=11,server=on,wait=off -serial chardev:serial ",
            r#"-netdev tap,id=net0-tap,fd=12 -device {"addr":"0x2","bus":"pcie.0","driver":"virtio-net-pci","guest_announce":false,"id":"net0","#,
            r#""mac":"52:54:00:01:02:03","netdev":"net0-tap","romfile":""} "#,
            r#"-add-fd fd=15,set=1 -blockdev {"cache":{"direct":false,"no-flush":false},"discard":"unmap","driver":"file","#,
            r#""filename":"/dev/fdset/1","node-name":"disk0-base-file","read-only":true} "#,
            r#"-blockdev {"driver":"raw","file":"disk0-base-file","node-name":"disk0-base","read-only":true} "#,
            r#"-add-fd fd=13,set=0 -add-fd fd=14,set=0 -blockdev {"cache":{"direct":true,"no-flush":false},"#,
            r#""discard":"unmap","driver":"file","filename":"/dev/fdset/0","node-name":"disk0-file","read-only":false} "#,
            r#"-blockdev {"backing":"disk0-base","cache":{"direct":true,"no-flush":false},"discard":"unmap","#,
            r#""driver":"qcow2","file":"disk0-file","node-name":"disk0-format"} "#,
            r#"-device {"addr":"0xa","bootindex":1,"bus":"pcie.0","drive":"disk0-format","driver":"virtio-blk-pci","#,
            r#""id":"disk0"} -incoming defer"#,
        );
        assert_eq!(built, expected);
        let pc = argv(&definition(Family::Pc), Mode::Boot, false, &descriptors())
            .unwrap()
            .join(" ");
        assert!(
            pc.contains("-machine pc-i440fx-7.2,hpet=off,vmport=off -accel") && pc.contains(r#""bus":"pci.0""#),
            "{pc}"
        );
        assert!(!pc.contains("-incoming") && !pc.contains("-sandbox"));
    }

    /// As the one of form 1.
    #[test]
    fn what_the_guest_sees_of_a_seed_in_form_2_never_changes() {
        let mut definition = definition(Family::Q35);
        let plain = argv(&definition, Mode::Boot, true, &descriptors()).unwrap().join(" ");
        definition.layout = definition.layout.with_seed();
        let seed = Some(16);
        let given = Descriptors { seed, ..descriptors() };
        let built = argv(&definition, Mode::Boot, true, &given).unwrap().join(" ");
        let more = concat!(
            r#" -add-fd fd=16,set=32 -blockdev {"cache":{"direct":false,"no-flush":false},"discard":"unmap","driver":"file","#,
            r#""filename":"/dev/fdset/32","node-name":"seed-file","read-only":true} "#,
            r#"-blockdev {"driver":"raw","file":"seed-file","node-name":"seed-format","read-only":true} "#,
            r#"-device {"addr":"0x1a","bus":"pcie.0","drive":"seed-format","driver":"virtio-blk-pci","id":"seed"}"#,
        );
        assert_eq!(built, plain + more);
        let refused = argv(&definition, Mode::Boot, true, &descriptors());
        assert!(matches!(refused, Err(ArgvError::Disagree(_))), "{refused:?}");
        definition.layout.version = 1;
        let refused = argv(&definition, Mode::Boot, true, &given);
        assert!(matches!(refused, Err(ArgvError::Disagree(_))), "{refused:?}");
    }

    #[test]
    fn a_word_with_more_in_it_is_refused() {
        let spoilt: [fn(&mut Layout); 5] = [
            |layout| layout.machine = "pc-q35-7.2,accel=kvm".to_owned(),
            |layout| layout.machine = String::new(),
            |layout| layout.cpu = "qemu64 -monitor stdio".to_owned(),
            |layout| layout.devices[0].id = "net0,script=/bin/sh".to_owned(),
            |layout| layout.devices[1].bus = "pcie.0\"".to_owned(),
        ];
        for spoil in spoilt {
            let mut definition = definition(Family::Q35);
            spoil(&mut definition.layout);
            let refused = argv(&definition, Mode::Boot, true, &descriptors());
            assert!(matches!(refused, Err(ArgvError::Word { .. })), "{refused:?}");
        }
    }

    #[test]
    fn a_layout_that_the_definition_does_not_bear_out_is_refused() {
        let spoilt: [fn(&mut Definition); 5] = [
            |definition| definition.layout.devices.clear(),
            |definition| definition.ports[0].port = PortId(Uuid::from_u128(9)),
            |definition| definition.volumes.clear(),
            |definition| definition.volumes[0].base = None,
            |definition| definition.layout.devices.truncate(1),
        ];
        for spoil in spoilt {
            let mut definition = definition(Family::Q35);
            spoil(&mut definition);
            let refused = argv(&definition, Mode::Boot, true, &descriptors());
            assert!(matches!(refused, Err(ArgvError::Disagree(_))), "{refused:?}");
        }
        let mut newer = definition(Family::Q35);
        newer.layout.version = 3;
        assert_eq!(
            argv(&newer, Mode::Boot, true, &descriptors()),
            Err(ArgvError::Version(3))
        );
    }
}
