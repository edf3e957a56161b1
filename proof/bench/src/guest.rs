//! The guest that all arms run: the micro template, 512 MB, one vCPU, one
//! virtio network card, one virtio disk on the shared pool.

use anyhow::{Context, Result};
use e2e::lab::Lab;
use e2e::run::run;
use image::micro::{Sources, TemplateFiles};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Memory of the guest, MiB.
pub const MEMORY_MIB: u32 = 512;

/// The tap that the arms' guests are plugged into, on either host.
pub const TAP: &str = "tap0";

/// The bridge of the arms' hosts, `vm0` in it.
pub const BRIDGE: &str = "br0";

/// The guest's files and address.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Where the template is, as hosts see it.
    dir: PathBuf,
    files: TemplateFiles,
    /// Its address on the guests' network.
    pub ip: Ipv4Addr,
    gateway: Ipv4Addr,
    /// Its hardware address.
    pub mac: &'static str,
    /// The QEMU that runs it.
    pub qemu: PathBuf,
}

impl Guest {
    /// Builds the micro template in the lab's shared pool.
    ///
    /// # Errors
    /// When a package is missing and cannot be fetched.
    pub fn build(lab: &Lab, qemu: &Path) -> Result<Guest> {
        let sources = Sources::found("/var/cache/godwit-bench");
        let files = image::micro::build(&lab.shared().join("bench"), &sources, &mut |_| {})
            .context("cannot build the micro template")?;
        Ok(Guest {
            dir: PathBuf::from("/srv/godwit/shared/bench"),
            files,
            ip: lab.nets().vm_ip(40),
            gateway: lab.nets().vm_ip(1),
            mac: "52:54:00:67:77:01",
            qemu: qemu.to_owned(),
        })
    }

    /// A fresh overlay for one run; its path as hosts see it.
    ///
    /// # Errors
    /// When qemu-img fails.
    pub fn fresh_disk(&self, lab: &Lab) -> Result<PathBuf> {
        let disk = lab.shared().join("bench/run.qcow2");
        let base = lab.shared().join("bench").join(&self.files.disk.file);
        let (disk_text, base) = (disk.to_string_lossy(), base.to_string_lossy());
        let format = self.files.disk_format.as_str();
        run(&[
            "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", &base, &disk_text,
        ])?;
        // Hosts see the pool elsewhere: the overlay names its base by its place beside it.
        run(&[
            "qemu-img",
            "rebase",
            "-q",
            "-u",
            "-F",
            format,
            "-b",
            &self.files.disk.file,
            &disk_text,
        ])?;
        Ok(self.dir.join("run.qcow2"))
    }

    /// Kernel, initramfs and command line, as hosts see them.
    pub fn boot(&self) -> (PathBuf, PathBuf, String) {
        let (ip, gateway) = (self.ip, self.gateway);
        (
            self.dir.join(&self.files.kernel.file),
            self.dir.join(&self.files.initrd.file),
            format!(
                "{} godwit.name=bench godwit.ip={ip}/24 godwit.gw={gateway}",
                self.files.command_line
            ),
        )
    }

    /// QEMU's command line, the smallest machine that has what the guest needs.
    /// It dials `qmp`, a socket as its host sees it; `extra` comes last.
    pub fn argv(&self, disk: &Path, qmp: &Path, extra: &[String]) -> Vec<String> {
        let (kernel, initrd, append) = self.boot();
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut argv = vec![text(&self.qemu)];
        let fixed = [
            ("-nodefaults", ""),
            ("-no-user-config", ""),
            ("-display", "none"),
            ("-machine", "q35,accel=tcg,vmport=off,graphics=off"),
            ("-cpu", "max"),
            ("-smp", "1"),
        ];
        for (option, value) in fixed {
            argv.push(option.to_owned());
            argv.extend((!value.is_empty()).then(|| value.to_owned()));
        }
        let file = format!(
            "driver=file,node-name=file0,filename={},cache.direct=on,cache.no-flush=off",
            text(disk)
        );
        let card = format!("virtio-net-pci,netdev=net0,mac={}", self.mac);
        let given = [
            ("-m", format!("{MEMORY_MIB}M")),
            ("-kernel", text(&kernel)),
            ("-initrd", text(&initrd)),
            ("-append", append),
            ("-serial", "file:/run/godwit/serial.log".to_owned()),
            ("-blockdev", file),
            ("-blockdev", "driver=qcow2,node-name=disk0,file=file0".to_owned()),
            ("-device", "virtio-blk-pci,drive=disk0".to_owned()),
            ("-netdev", format!("tap,id=net0,ifname={TAP},script=no,downscript=no")),
            ("-device", card),
            ("-qmp", format!("unix:{}", text(qmp))),
        ];
        argv.extend(given.into_iter().flat_map(|(option, value)| [option.to_owned(), value]));
        argv.extend_from_slice(extra);
        argv
    }
}
