//! A network namespace for one test, gone with its thread, and guests that speak raw Ethernet through their taps.
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]
#![allow(dead_code)] // each test program uses a part

use std::{
    os::fd::OwnedFd,
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use model::{Mac, PortId};
use network::{Announcement, Bridge, BridgeSpec, InterfaceName, Network, Port};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use uuid::Uuid;

/// Long enough for a loaded machine; reached only by a test that fails.
pub const DEADLINE: Duration = Duration::from_secs(10);
const VIRTIO_HEADER: usize = 10;

/// One test at a time: a process that another test is just starting holds copies of this test's taps until it has
/// executed its program, and a tap lives as long as any copy.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a test on a thread in a network namespace of its own.
pub fn in_namespace(test: impl FnOnce(Network) + Send + 'static) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let outcome = std::thread::spawn(move || {
        #[allow(unsafe_code)]
        // SAFETY: only the network namespace is unshared, which changes no memory or descriptor of other threads.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("these tests need root, for a network namespace");
        test(Network::open().unwrap());
    });
    if let Err(panic) = outcome.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the thread's namespace.
pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// What `ip` prints.
pub fn ip_output(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until a bridge forwards what comes through this port: the kernel tells a bridge of a new carrier from a work
/// queue, some time after both ends of the cable are up, and drops every frame until then.
pub fn wait_until_forwarding(port: &str) {
    let end = Instant::now() + DEADLINE;
    while !ip_output(&format!("-details link show dev {port}")).contains("bridge_slave state forwarding") {
        assert!(Instant::now() < end, "{port} does not forward");
    }
}

pub fn name(text: &str) -> InterfaceName {
    text.parse().unwrap()
}

pub fn spec(bridge: &str) -> BridgeSpec {
    BridgeSpec {
        name: name(bridge),
        mtu: 1500,
        uplink: None,
        gateway: None,
    }
}

pub fn bridge(network: &Network, bridge: &str) -> Bridge {
    network.ensure_bridge(&spec(bridge)).unwrap()
}

/// A guest: the holder of a tap.
pub struct Guest {
    pub port: Port,
    pub mac: [u8; 6],
    pub fd: OwnedFd,
}

impl Guest {
    /// A guest whose port is still blocked.
    pub fn blocked(network: &Network, bridge: &str, number: u8) -> Self {
        let tap = network
            .create_tap(PortId(Uuid::from_u128(u128::from(number) + 100)), &name(bridge))
            .unwrap();
        Self {
            port: tap.port,
            mac: mac(number),
            fd: tap.fd,
        }
    }

    pub fn open(network: &Network, bridge: &str, number: u8) -> Self {
        let guest = Self::blocked(network, bridge, number);
        network.open_port(&guest.port, &guest.announcement()).unwrap();
        guest
    }

    pub fn announcement(&self) -> Announcement {
        Announcement::new(Mac(self.mac), &[])
    }

    /// Sends a frame with this text.
    pub fn send(&self, to: [u8; 6], text: &str) {
        let ethertype = [0x88, 0xb5]; // for local experiments
        self.send_frame(&[&to[..], &self.mac, &ethertype, text.as_bytes()].concat());
    }

    /// Sends a frame as it is, padded.
    pub fn send_frame(&self, frame: &[u8]) {
        let mut bytes = [&[0; VIRTIO_HEADER], frame].concat();
        bytes.resize(bytes.len().max(VIRTIO_HEADER + 60), 0);
        rustix::io::write(&self.fd, &bytes).unwrap();
    }

    /// Whole frames that are queued now.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.read()).collect()
    }

    /// The text of the next frame of ours that arrives; others (such as announcements) are passed over.
    pub fn receive(&self) -> String {
        self.next_frame(|frame| frame[12..14] == [0x88, 0xb5])
            .map(|frame| text(&frame))
            .expect("no frame in time")
    }

    /// The texts of the frames of ours that are queued now.
    pub fn queued(&self) -> Vec<String> {
        let mut texts = Vec::new();
        while let Some(frame) = self.read() {
            if frame[12..14] == [0x88, 0xb5] {
                texts.push(text(&frame));
            }
        }
        texts
    }

    /// Waits for a frame that fits.
    pub fn next_frame(&self, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + DEADLINE;
        while Instant::now() < end {
            match self.read() {
                Some(frame) if fits(&frame) => return Some(frame),
                Some(_) => {}
                None => {
                    let wait = Timespec {
                        tv_sec: 0,
                        tv_nsec: 100_000_000,
                    };
                    poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&wait)).unwrap();
                }
            }
        }
        None
    }

    fn read(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        match rustix::io::read(&self.fd, bytes.as_mut_slice()) {
            Ok(len) => Some(bytes[VIRTIO_HEADER..len].to_vec()),
            Err(Errno::AGAIN) => None,
            Err(errno) => panic!("reading a tap: {errno}"),
        }
    }
}

pub fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

fn text(frame: &[u8]) -> String {
    String::from_utf8_lossy(&frame[14..]).trim_end_matches('\0').to_owned()
}
