//! The guest's initramfs: busybox with its init, the modules in order, the guest program.

use super::cpio::Archive;
use super::modules::Tree;
use super::packages::Kernel;
use super::{BuildError, Progress, Step, failed};
use crate::process::Run;
use std::path::Path;
use std::time::Duration;

/// The guest program, compiled by the build script.
static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/godwit-micro"));

/// busybox init's table: set up, serve, and a shell on the serial console when somebody presses Enter.
const INITTAB: &str = "\
::sysinit:/etc/rc
::respawn:/bin/godwit-micro
ttyS0::askfirst:/bin/sh
::ctrlaltdel:/bin/busybox reboot
";

/// Runs once, before the program: file systems, modules, address. Values come from the kernel command line.
const RC: &str = r#"#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/lib/modules/$module.ko"; done < /etc/modules
read -r line < /proc/cmdline
name=micro ip= gw= mtu=
for word in $line; do
    case "$word" in
        godwit.name=*) name="${word#*=}" ;;
        godwit.ip=*) ip="${word#*=}" ;;
        godwit.gw=*) gw="${word#*=}" ;;
        godwit.mtu=*) mtu="${word#*=}" ;;
    esac
done
hostname "$name"
ip link set dev lo up
[ -n "$mtu" ] && ip link set dev eth0 mtu "$mtu"
[ -n "$ip" ] && [ "$ip" != dhcp ] && ip address add "$ip" dev eth0
ip link set dev eth0 up
[ "$ip" = dhcp ] && udhcpc -i eth0 -b -S -t 5 -T 1 -s /etc/dhcp
[ -n "$gw" ] && ip route add default via "$gw" dev eth0
mount -t tmpfs tmp /tmp
"#;

/// What udhcpc does with a lease. What it was told last lies in /run/lease.
const DHCP: &str = r#"#!/bin/busybox sh
case "$1" in
bound|renew)
    [ -n "$mtu" ] && ip link set dev "$interface" mtu "$mtu"
    ip address replace "$ip/$mask" dev "$interface"
    set -- "$1" $staticroutes
    event="$1"
    shift
    while [ $# -ge 2 ]; do
        case "$2" in
            0.0.0.0) ip route replace "$1" dev "$interface" ;;
            *) ip route replace "$1" via "$2" dev "$interface" ;;
        esac
        shift 2
    done
    : > /etc/resolv.conf
    [ -n "$domain" ] && echo "search $domain" >> /etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
    {
        echo "$event $ip/$mask by $serverid for $lease mtu $mtu router $router dns $dns domain $domain host $hostname"
        cat /run/lease
    } > /run/lease.new 2> /dev/null
    mv /run/lease.new /run/lease
    ;;
deconfig|nak)
    ip -4 address flush dev "$interface"
    ;;
esac
"#;

/// Packs the initramfs. It is not compressed: unpacking would cost an emulated guest more than QEMU's copying does.
///
/// # Errors
/// When a part cannot be read or the kernel lacks a module.
pub(crate) fn make(kernel: &Kernel, busybox: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Vec<u8>, BuildError> {
    let detail = format!("packing modules of Linux {}", kernel.release);
    progress(Progress {
        step: Step::Initrd,
        detail: detail.clone(),
        bytes_done: 0,
        bytes_total: 0,
    });
    let wrong = |reason| BuildError::Modules {
        release: kernel.release.clone(),
        reason,
    };
    let modules = Tree::open(&kernel.modules, busybox)
        .and_then(|tree| tree.in_loading_order())
        .map_err(wrong)?;

    let mut archive = Archive::default();
    for directory in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
    ] {
        archive.directory(directory);
    }
    // The kernel opens this for init before anything is mounted.
    archive.device("dev/console", 5, 1);
    archive.link("init", "bin/busybox");
    archive.file(
        "bin/busybox",
        0o755,
        &std::fs::read(busybox).map_err(failed("read", busybox))?,
    );
    for applet in applets(busybox)? {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("bin/godwit-micro", 0o755, PROGRAM);
    archive.file("etc/inittab", 0o644, INITTAB.as_bytes());
    archive.file("etc/rc", 0o755, RC.as_bytes());
    archive.file("etc/dhcp", 0o755, DHCP.as_bytes());
    let names: String = modules.iter().map(|module| format!("{}\n", module.name)).collect();
    archive.file("etc/modules", 0o644, names.as_bytes());
    for module in &modules {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.content);
    }
    let bytes = archive.finish();
    let total = bytes.len() as u64;
    progress(Progress {
        step: Step::Initrd,
        detail,
        bytes_done: total,
        bytes_total: total,
    });
    Ok(bytes)
}

/// The names under which busybox can be called.
fn applets(busybox: &Path) -> Result<Vec<String>, BuildError> {
    let run = Run::new(&busybox.to_string_lossy(), Duration::from_secs(20))
        .arg("--list")
        .output();
    let list = run.map_err(|source| super::SourceError::Unpack {
        package: "busybox-static".into(),
        source,
    })?;
    let plain =
        |name: &&str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_[".contains(&b)) && *name != "busybox";
    Ok(String::from_utf8_lossy(&list)
        .lines()
        .filter(plain)
        .map(String::from)
        .collect())
}
