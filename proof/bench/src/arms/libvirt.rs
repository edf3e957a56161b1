//! Arms `libvirt` and `libvirt-tuned`: `virsh migrate --live --p2p` between two libvirtd,
//! with its defaults, and with all the speed that its options give. Unencrypted, as it comes.

use super::qemu::{A, B, prepare_network, wall_ms};
use super::{Arm, Bench, Moved};
use crate::guest::{BRIDGE, Guest, MEMORY_MIB};
use anyhow::{Context, Result, bail};
use e2e::lab::{Lab, Place, Proc};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// What libvirtd keeps and reads; private to each host.
pub const PRIVATE: [&str; 6] = [
    "/etc/libvirt",
    "/etc/passwd",
    "/etc/group",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
];

const START_LIMIT: Duration = Duration::from_secs(30);
const EVENT_LIMIT: Duration = Duration::from_secs(20);
const DOMAIN: &str = "bench";

/// See the file's first lines.
#[derive(Debug, Default)]
pub struct Libvirt {
    tuned: bool,
    /// QEMU's STOP on the source and RESUME on the destination, as `virsh` prints them.
    events: Option<(Proc, Proc)>,
}

impl Libvirt {
    /// The arm `libvirt-tuned`.
    pub fn tuned() -> Libvirt {
        Libvirt {
            tuned: true,
            events: None,
        }
    }

    /// Whether this machine has libvirt.
    pub fn is_installed() -> bool {
        ["/usr/sbin/libvirtd", "/usr/bin/virsh"]
            .iter()
            .all(|program| Path::new(program).exists())
    }
}

impl Arm for Libvirt {
    fn name(&self) -> &'static str {
        if self.tuned { "libvirt-tuned" } else { "libvirt" }
    }

    fn boot(&mut self, bench: &Bench<'_>) -> Result<Ipv4Addr> {
        prepare_network(bench.lab)?;
        for n in [A, B] {
            start_daemon(bench.lab, n)?;
        }
        let disk = bench.guest.fresh_disk(bench.lab)?;
        let xml = bench.lab.host(A)?.dir().join("state/bench.xml");
        fs::write(&xml, domain_xml(bench.guest, &disk)).context("cannot write the domain's XML")?;
        virsh(bench.lab, A, &["create", "/var/lib/godwit/bench.xml"])?;
        let listen = |n: u8, event: &str| {
            let argv = [
                "stdbuf",
                "-oL",
                "virsh",
                "-c",
                "qemu:///system",
                "qemu-monitor-event",
                "--loop",
                "--event",
                event,
            ];
            bench.lab.spawn(Place::Host(n), &format!("virsh-{event}-h{n}"), &argv)
        };
        self.events = Some((listen(A, "STOP")?, listen(B, "RESUME")?));
        Ok(bench.guest.ip)
    }

    fn migrate(&mut self, bench: &Bench<'_>) -> Result<Moved> {
        let destination = format!("qemu+tcp://{}/system", bench.lab.host(B)?.address());
        // `--unsafe`: libvirt cannot know that the pool is shared, as it is a plain directory.
        let mut argv = vec!["migrate", "--live", "--p2p", "--unsafe", DOMAIN, &destination];
        if self.tuned {
            argv.extend(["--bandwidth", "100000", "--parallel", "--parallel-connections", "2"]);
            virsh(bench.lab, A, &["migrate-setmaxdowntime", DOMAIN, "10"])?;
        }
        let started_ms = wall_ms();
        virsh(bench.lab, A, &argv)?;
        let total_ms = wall_ms() - started_ms;
        let (stops, resumes) = self.events.as_mut().context("the guest is not running")?;
        let stopped = event_ms(&stops.wait_line("event STOP", EVENT_LIMIT)?)?;
        let resumed = event_ms(&resumes.wait_line("event RESUME", EVENT_LIMIT)?)?;
        Ok(Moved {
            request_to_running_ms: resumed - started_ms,
            total_ms,
            qemu_downtime_ms: Some(resumed - stopped),
            bytes: bytes_sent(bench.lab),
        })
    }

    fn end(&mut self, bench: &Bench<'_>) -> Result<()> {
        if let Some((mut stops, mut resumes)) = self.events.take() {
            stops.kill()?;
            resumes.kill()?;
        }
        for n in [A, B] {
            // It is on one of the two.
            let _ = virsh(bench.lab, n, &["destroy", DOMAIN]);
        }
        Ok(())
    }
}

/// Starts libvirtd on host `n` unless it answers already.
fn start_daemon(lab: &Lab, n: u8) -> Result<()> {
    if virsh(lab, n, &["version"]).is_ok() {
        return Ok(());
    }
    let host = lab.host(n)?;
    let etc = host.dir().join("private/0");
    let address = host.address();
    // Two hosts of one machine have one hardware UUID, and libvirt refuses to migrate "to the same host".
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random id")?;
    let daemon = format!(
        "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{address}\"\nhost_uuid = \"{}\"\n",
        uuid.trim()
    );
    fs::write(etc.join("libvirtd.conf"), daemon).context("cannot write libvirtd.conf")?;
    let driver = format!(
        "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\n\
         remember_owner = 0\nstdio_handler = \"file\"\nmigration_host = \"{address}\"\n"
    );
    fs::write(etc.join("qemu.conf"), driver).context("cannot write qemu.conf")?;
    for started in ["autostart", "networks/autostart"] {
        let _ = fs::remove_dir_all(etc.join("qemu").join(started));
    }
    // libvirtd looks its usual user up even when it is told to use another.
    for (index, entry) in [
        (1, "libvirt-qemu:x:64055:64055::/:/bin/false\n"),
        (2, "libvirt-qemu:x:64055:\n"),
    ] {
        let file = host.dir().join("private").join(index.to_string());
        let known = fs::read_to_string(&file).context("cannot read the host's users")?;
        if !known.contains("libvirt-qemu:") {
            fs::write(&file, known + entry).context("cannot add libvirt's user on the host")?;
        }
    }
    let process = lab.spawn(
        Place::Host(n),
        &format!("libvirtd-h{n}"),
        &["/usr/sbin/libvirtd", "--listen"],
    )?;
    let end = Instant::now() + START_LIMIT;
    while let Err(error) = virsh(lab, n, &["version"]) {
        if Instant::now() > end {
            let log = process.log().display().to_string();
            return Err(error.context(format!("libvirtd does not answer on h{n}; see {log}")));
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn virsh(lab: &Lab, n: u8, arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["virsh", "-q", "-c", "qemu:///system"];
    argv.extend(arguments);
    lab.run(Place::Host(n), &argv)
}

/// `event STOP at 1700000000.123456 for domain 'bench': ...`
fn event_ms(line: &str) -> Result<f64> {
    let seconds = line
        .split_once(" at ")
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<f64>().ok());
    match seconds {
        Some(seconds) => Ok(seconds * 1e3),
        None => bail!("virsh printed an event without a time: {line}"),
    }
}

/// Bytes of memory, as the destination recorded them; older versions do not.
fn bytes_sent(lab: &Lab) -> Option<f64> {
    let stats = virsh(lab, B, &["domjobinfo", DOMAIN, "--completed", "--rawstats"]).ok()?;
    let line = stats
        .lines()
        .find_map(|line| line.trim().strip_prefix("memory_processed:"))?;
    line.trim().parse().ok()
}

/// The same guest: kernel, initramfs, one virtio card, one virtio disk, a serial line.
fn domain_xml(guest: &Guest, disk: &Path) -> String {
    let (kernel, initrd, append) = guest.boot();
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let (kernel, initrd, disk) = (text(kernel), text(initrd), disk.to_string_lossy());
    let (qemu, mac, tap) = (guest.qemu.to_string_lossy(), guest.mac, "bench-tap");
    format!(
        "<domain type='qemu'>
  <name>{DOMAIN}</name>
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum' check='none'/>
  <devices>
    <emulator>{qemu}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <source bridge='{BRIDGE}'/><mac address='{mac}'/><model type='virtio'/><target dev='{tap}'/>
    </interface>
    <serial type='file'><source path='/run/godwit/serial.log'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_an_event_is_read_and_its_absence_is_an_error() {
        let line = "event STOP at 1700000000.123456 for domain 'bench': (null)";
        assert!((event_ms(line).unwrap() - 1_700_000_000_123.456).abs() < 0.01);
        assert!(event_ms("event STOP").is_err());
    }
}
