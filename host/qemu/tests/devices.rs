//! What a definition names reaches the guest: kernel and words, an overlay's base, a tap. On the real QEMU.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod common;

use std::fs::Permissions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Host, Shared, assert_counts, given, installed, launch, left_out, read_to, ticks, volume};
use driver::{Action, Happened, Launch, Mode};
use model::layout::{Family, Layout};
use model::order::{PortUse, VolumeBase};
use model::storage::{Digest, Format};
use model::template::{Blob, Boot};
use model::{Mac, PortId};
use qemu::{Given, GivenKernel, Qemu};
use rustix::event::{PollFd, PollFlags, poll};

/// A Linux kernel by its header alone (Linux's `Documentation/arch/x86/boot.rst`), that sends its command line to the serial port.
fn speaking_kernel() -> Vec<u8> {
    let mut kernel = vec![0; 2048];
    let mut put = |at: usize, bytes: &[u8]| kernel[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &[0x20]); // syssize
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x2e]); // jmp 0x230
    put(0x202, b"HdrS\x03\x02"); // version 2.03
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x212, &[0x00, 0x80]); // setup_move_size
    put(0x214, &[0x00, 0x00, 0x10, 0x00]); // code32_start
    put(0x224, &[0x00, 0xfe]); // heap_end_ptr
    put(0x22c, &[0xff, 0xff, 0xff, 0x37]); // initrd_addr_max
    #[rustfmt::skip]
    put(0x230, &[
        0x66, 0xa1, 0x28, 0x02, // mov eax,[0x228]  cmd_line_ptr
        0x66, 0x89, 0xc6,       // mov esi,eax
        0x66, 0xc1, 0xe8, 0x04, // shr eax,4
        0x8e, 0xd8,             // mov ds,ax
        0x83, 0xe6, 0x0f,       // and si,0xf
        0xfc,                   // cld
        0xba, 0xf8, 0x03,       // mov dx,0x3f8
        0xac,                   // 244: lodsb
        0xee,                   // out dx,al
        0x84, 0xc0,             // test al,al
        0x75, 0xfa,             // jnz 0x244
        0xf4,                   // 24a: hlt
        0xeb, 0xfd,             // jmp 0x24a
    ]);
    kernel
}

async fn started(qemu: &Qemu, launch: Launch, directory: tempfile::TempDir, given: Given) -> Host {
    let vm = qemu
        .spawn(launch, given)
        .await
        .unwrap_or_else(|error| panic!("{error}: {error:?}"));
    let mut host = Host::of(directory, vm);
    assert!(matches!(host.next().await, Happened::Up { .. }));
    host
}

fn port(mac: [u8; 6]) -> PortUse {
    PortUse {
        port: PortId(uuid::Uuid::now_v7()),
        mac: Mac(mac),
        ip: [10, 91, 0, 7].into(),
        prefix: 24,
        gateway: Some([10, 91, 0, 1].into()),
        mtu: 1450,
        v6: None,
        addressing: model::addressing::Addressing::default(),
        policy: model::PortPolicy::default(),
    }
}

/// The definition with `port` in front of its disk, laid out anew.
fn with_port(shared: &mut Shared, capabilities: &qemu::Capabilities, port: PortUse) {
    let hypervisor = capabilities.hypervisor(model::host::Accelerator::Tcg, "a test".to_owned());
    let definition = &mut shared.definition;
    let volumes: Vec<_> = definition.volumes.iter().map(|used| used.place.volume).collect();
    definition.layout = Layout::fix(Family::Q35, &hypervisor, 1, 64, &[port.port], &volumes).unwrap();
    definition.ports = vec![port];
}

#[tokio::test]
async fn a_kernel_boots_from_files_in_a_closed_directory_and_learns_its_name() {
    let (qemu, capabilities) = installed().await;
    let mut shared = Shared::new(&capabilities, Family::Q35);
    let blob = Blob {
        digest: Digest([0; 32]),
        size_bytes: 1,
    };
    shared.definition.boot = Boot::Direct {
        kernel: blob,
        initrd: blob,
        cmdline: "console=ttyS0 x=a,b".to_owned(),
    };
    let (kernel, initrd) = (
        shared.directory.path().join("kernel"),
        shared.directory.path().join("initrd"),
    );
    std::fs::write(&kernel, speaking_kernel()).unwrap();
    std::fs::write(&initrd, "no such thing").unwrap();
    std::fs::set_permissions(shared.directory.path(), Permissions::from_mode(0o700)).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let launch = launch(&shared, Mode::Boot, &directory.path().join("run"));
    let read = |path| OwnedFd::from(std::fs::File::open(path).unwrap());
    let files = Given {
        boot: Some(GivenKernel {
            kernel: read(kernel),
            initrd: read(initrd),
        }),
        ..given(&shared, vec![])
    };
    let mut host = started(&qemu, launch, directory, files).await;
    let mut serial = host.serial().await;
    host.run().await;
    assert_eq!(
        String::from_utf8_lossy(&read_to(&mut serial, 0).await),
        "console=ttyS0 x=a,b godwit.name=ticker\0"
    );
    host.end().await;
}

#[tokio::test]
async fn an_overlay_boots_from_its_base_whatever_its_header_says() {
    let (qemu, capabilities) = installed().await;
    let mut shared = Shared::new(&capabilities, Family::Q35);
    let overlay = shared.directory.path().join("overlay.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&overlay)
        .arg("1M")
        .status();
    assert!(made.expect("qemu-img is installed: see the README").success());
    // A guest that was root of its overlay could have written this: it must not be followed.
    let rebased = Command::new("qemu-img")
        .args(["rebase", "-u", "-b", "/etc/passwd", "-F", "raw"])
        .arg(&overlay)
        .status();
    assert!(rebased.unwrap().success());
    let used = &mut shared.definition.volumes[0];
    used.place.format = Format::Qcow2;
    used.base = Some(VolumeBase {
        digest: Digest([0; 32]),
        format: Format::Raw,
    });

    let directory = tempfile::tempdir().unwrap();
    let launch = launch(&shared, Mode::Boot, &directory.path().join("run"));
    let files = Given {
        volumes: vec![volume(&overlay, Some(&shared.disk()))],
        ..Given::default()
    };
    let mut host = started(&qemu, launch, directory, files).await;
    let mut serial = host.serial().await;
    host.run().await;
    assert_counts(&ticks(&mut serial, 50).await);
    host.end().await;
}

/// A file that is open for reading alone is enough, in both senses.
#[tokio::test]
async fn a_seed_is_a_read_only_disk_at_its_slot() {
    let (qemu, capabilities) = installed().await;
    let mut shared = Shared::new(&capabilities, Family::Q35);
    shared.definition.layout = shared.definition.layout.clone().with_seed();
    let seed = shared.directory.path().join("seed");
    std::fs::write(&seed, vec![7; 4096]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    let missing = qemu
        .spawn(launch(&shared, Mode::Boot, &run), given(&shared, vec![]))
        .await;
    let missing = missing.unwrap_err().to_string();
    assert_eq!(missing, "0 seeds were given for 1 in the definition");
    let files = Given {
        seed: Some(std::fs::File::open(&seed).unwrap().into()),
        ..given(&shared, vec![])
    };
    let mut host = started(&qemu, launch(&shared, Mode::Boot, &run), directory, files).await;
    let mut serial = host.serial().await;
    host.run().await;
    // The guest starts from its own disk, not from this one.
    assert_counts(&ticks(&mut serial, 50).await);
    host.end().await;
}

/// A tap in a network namespace of its own, up, and a socket that sees its frames. Both namespace and tap go with their holders.
#[allow(unsafe_code)]
fn tap() -> (OwnedFd, OwnedFd) {
    let make = || {
        // SAFETY: only this thread's network namespace changes, and the thread ends with this closure.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let tun: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap()
            .into();
        // SAFETY: all zeros are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(*b"test0") {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call.
        assert_eq!(
            unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) },
            0
        );
        assert!(
            Command::new("ip")
                .args(["link", "set", "test0", "up"])
                .status()
                .unwrap()
                .success()
        );
        // SAFETY: a plain system call; the number that it returns is a new descriptor.
        let frames = unsafe {
            let all = i32::from((libc::ETH_P_ALL as u16).to_be());
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                all,
            );
            assert!(fd >= 0);
            <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd)
        };
        (tun, frames)
    };
    std::thread::spawn(make).join().unwrap()
}

/// Waits for up to `wanted` announcements (RARP, RFC 903) of `mac`, for as long as frames come.
fn announcements(frames: &OwnedFd, mac: [u8; 6], wanted: usize) -> usize {
    let patience = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    let mut announced = 0;
    while announced < wanted {
        let mut waits = [PollFd::new(frames, PollFlags::IN)];
        if poll(&mut waits, Some(&patience)).unwrap() == 0 {
            break;
        }
        let mut frame = [0; 2048];
        let (_, length) = rustix::net::recv(frames, &mut frame, rustix::net::RecvFlags::empty()).unwrap();
        if length >= 42 && frame[6..12] == mac && frame[12..14] == [0x80, 0x35] {
            announced += 1;
        }
    }
    announced
}

#[tokio::test]
async fn a_card_sends_by_the_tap_it_was_given_and_announces_itself() {
    if !rustix::process::geteuid().is_root() {
        return left_out("a card sends by the tap it was given", "a tap needs root");
    }
    let (qemu, capabilities) = installed().await;
    let mac = [0x52, 0x54, 0x00, 0xab, 0xcd, 0xef];
    let mut shared = Shared::new(&capabilities, Family::Q35);
    with_port(&mut shared, &capabilities, port(mac));
    let (tap, frames) = tap();
    let directory = tempfile::tempdir().unwrap();
    let launch = launch(&shared, Mode::Boot, &directory.path().join("run"));
    let mut host = started(&qemu, launch, directory, given(&shared, vec![tap])).await;
    host.run().await;
    let begun = Instant::now();
    host.act(Action::Announce);
    let announced = tokio::task::spawn_blocking(move || announcements(&frames, mac, 5))
        .await
        .unwrap();
    assert_eq!(announced, 5, "again and again");
    assert!(begun.elapsed() > Duration::from_millis(400), "for half a second");
    host.end().await;
}
