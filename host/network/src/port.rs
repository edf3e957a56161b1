//! Ports: a tap for a guest, born blocked, opened in microseconds, gone with its holder.

use std::{collections::BTreeMap, io, os::fd::OwnedFd};

use model::PortId;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{
    Announcement, InterfaceName, Network,
    bridge::has_ipv6,
    link::{self, Change, Link, PORT_FORWARDING, PORT_LISTENING},
    netlink::NetlinkError,
    sys,
};

const TUN_DEVICE: &str = "/dev/net/tun";
/// The driver kind that the kernel reports for taps.
const TAP_KIND: &str = "tun";
const TAP_PREFIX: &str = "gw";
/// The alias of a tap is this followed by its port's id.
const ALIAS_PREFIX: &str = "godwit port ";
/// Longest frame a tap hands out: the largest MTU, its Ethernet and virtio-net headers, rounded up.
const FRAME_BYTES_MAX: usize = 1 << 17;
/// Most frames a new tap can have queued: the kernel's default queue length.
const QUEUED_FRAMES_MAX: usize = 1000;

/// A port of a VM on this host: its tap, attached to a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The port's id.
    pub id: PortId,
    /// The tap's name, see [`tap_name`].
    pub tap: String,
    /// The kernel's number for the tap; a tap made again has another.
    pub index: u32,
    /// The kernel's number for the bridge.
    pub bridge_index: u32,
}

/// A new tap, its port blocked.
#[derive(Debug)]
pub struct Tap {
    /// The port.
    pub port: Port,
    /// The tap itself, closed on exec: hand it to QEMU (`-netdev tap,fd=`) and drop it. The interface vanishes with the
    /// last holder of this descriptor. Frames carry a virtio-net header.
    pub fd: OwnedFd,
}

/// A tap of ours that was found on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundPort {
    /// The port.
    pub port: Port,
    /// Whether frames pass.
    pub open: bool,
}

/// What went through a port since its tap was made, from the guest's point of view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Frames that the guest sent.
    pub sent_frames: u64,
    /// Frames of the guest that the host dropped.
    pub sent_dropped: u64,
    /// Bytes that the guest took.
    pub received_bytes: u64,
    /// Frames that the guest took.
    pub received_frames: u64,
    /// Frames to the guest that were dropped because it did not take them in time.
    pub received_dropped: u64,
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The caller may not make taps.
    #[error("not permitted to make tap {tap}; run the agent as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// The tap.
        tap: String,
    },
    /// The kernel's tap driver is not there.
    #[error("cannot open {TUN_DEVICE} for tap {tap}; is the kernel module loaded? (`modprobe tun`)")]
    Device {
        /// The tap.
        tap: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bridge does not exist.
    #[error("bridge {bridge} for tap {tap} does not exist or is no bridge; make it first")]
    NoBridge {
        /// The tap.
        tap: String,
        /// The bridge.
        bridge: InterfaceName,
    },
    /// The tap exists already: its QEMU lives.
    #[error("tap {tap} exists: a QEMU of this port still runs; stop it, or remove the port, first")]
    Exists {
        /// The tap.
        tap: String,
    },
    /// The driver refused.
    #[error("cannot make tap {tap}")]
    Driver {
        /// The tap.
        tap: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to configure it.
    #[error("cannot attach tap {tap} to bridge {bridge}")]
    Kernel {
        /// The tap.
        tap: String,
        /// The bridge.
        bridge: InterfaceName,
        /// Why.
        #[source]
        source: NetlinkError,
    },
}

/// Why a port could not be found, opened, blocked, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The caller may not configure the network.
    #[error("not permitted to {step} port {tap}; run the agent as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
    },
    /// The tap is gone, and so is the QEMU that held it.
    #[error("cannot {step} port {tap}: it is gone, and with it the QEMU that held it")]
    Gone {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
    },
    /// The tap was taken down or off its bridge by others.
    #[error("cannot {step} port {tap}: it is down or off its bridge, which Godwit did not do; restart or move its VM")]
    Detached {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
    },
    /// An interface of that name is not the port's.
    #[error("interface {tap} is not a tap of Godwit's for port {id}; rename or remove it")]
    NotOurs {
        /// The name.
        tap: String,
        /// The port.
        id: PortId,
    },
    /// The kernel refused for another reason.
    #[error("cannot {step} port {tap}")]
    Kernel {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
        /// Why.
        #[source]
        source: NetlinkError,
    },
}

/// The tap's name on every host: `gw` and the last 62 bits of the port's id, which are its random part, in base 32.
#[must_use]
pub fn tap_name(id: PortId) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let random = id.0.as_u64_pair().1 & (u64::MAX >> 2);
    let digits = (0..13u32)
        .rev()
        .map(|place| char::from(DIGITS[(random >> (5 * place) & 31) as usize]));
    TAP_PREFIX.chars().chain(digits).collect()
}

impl Network {
    /// Makes the tap of a port, up and attached to the bridge, blocked. Its frames are as large as the bridge's.
    ///
    /// # Errors
    /// [`TapError`]; nothing is left. [`TapError::Exists`] when a QEMU still holds the port's tap.
    pub fn create_tap(&self, id: PortId, bridge: &InterfaceName) -> Result<Tap, TapError> {
        let tap = tap_name(id);
        let netlink = &mut *self.slow();
        let fail = |source: NetlinkError| match source.errno() {
            Some(Errno::PERM) => TapError::NotPermitted { tap: tap.clone() },
            _ => TapError::Kernel {
                tap: tap.clone(),
                bridge: bridge.clone(),
                source,
            },
        };
        let found = link::find(netlink, bridge.as_str()).map_err(fail)?;
        let Some(master) = found.filter(|link| link.kind == "bridge") else {
            return Err(TapError::NoBridge {
                tap: tap.clone(),
                bridge: bridge.clone(),
            });
        };
        let fd = open_tap(&tap)?;
        let vanished = || {
            fail(NetlinkError::Refused {
                errno: Errno::NODEV,
                detail: None,
            })
        };
        let index = link::find(netlink, &tap).map_err(fail)?.ok_or_else(vanished)?.index;
        let mut change = Change::of(index).alias(&format!("{ALIAS_PREFIX}{id}")).mtu(master.mtu);
        if has_ipv6() {
            change = change.no_ipv6_address();
        }
        // In this order: enslaved while down it is disabled, and a port must be up to be told to listen.
        netlink
            .execute(&[
                change.message(),
                Change::of(index).master(master.index).message(),
                Change::up(index).message(),
                link::port_state(index, PORT_LISTENING),
            ])
            .map_err(fail)?;
        // Between "up" and "listen" frames may have been queued for the guest; nobody else has the descriptor yet.
        drain(&fd).map_err(|errno| TapError::Driver {
            tap: tap.clone(),
            source: errno.into(),
        })?;
        Ok(Tap {
            port: Port {
                id,
                tap,
                index,
                bridge_index: master.index,
            },
            fd,
        })
    }

    /// The port's tap on this host, if there is one: for an agent that was restarted.
    ///
    /// # Errors
    /// [`PortError::NotOurs`] if something else has its name.
    pub fn find_port(&self, id: PortId) -> Result<Option<FoundPort>, PortError> {
        let tap = tap_name(id);
        let found = link::find(&mut self.slow(), &tap).map_err(failure(&tap, "find"))?;
        match found {
            None => Ok(None),
            Some(link) => match found_port(&link).filter(|found| found.port.id == id) {
                Some(port) => Ok(Some(port)),
                None => Err(PortError::NotOurs { tap, id }),
            },
        }
    }

    /// Announces the guest on the bridge and lets its frames pass, at once; the bridge itself knows from here on that the
    /// guest is behind this port. Meant for the blackout of a migration: a few system calls, no waiting. The announcement
    /// goes first, while the port is still blocked, so that the guest does not hear itself.
    ///
    /// # Errors
    /// [`PortError`]. A failed announcement is only logged: the guest's own traffic, and QEMU's, announce it as well.
    pub fn open_port(&self, port: &Port, announcement: &Announcement) -> Result<(), PortError> {
        self.announce(port, announcement);
        self.fast()
            .execute(&[
                link::port_state(port.index, PORT_FORWARDING),
                link::forwarding_entry(port.index, announcement.mac().0),
            ])
            .map_err(failure(&port.tap, "open"))
    }

    /// Stops all frames from and to the guest, at once.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn block_port(&self, port: &Port) -> Result<(), PortError> {
        self.fast()
            .execute(&[link::port_state(port.index, PORT_LISTENING)])
            .map_err(failure(&port.tap, "block"))
    }

    /// The port's counters.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn counters(&self, port: &Port) -> Result<PortCounters, PortError> {
        let fail = failure(&port.tap, "read the counters of");
        let found = link::find_index(&mut self.slow(), port.index).map_err(&fail)?;
        let gone = || {
            fail(NetlinkError::Refused {
                errno: Errno::NODEV,
                detail: None,
            })
        };
        Ok(PortCounters::of(
            found.filter(|link| link.name == port.tap).ok_or_else(gone)?.statistics,
        ))
    }

    /// The counters of all taps of ours in this namespace.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn all_counters(&self) -> Result<BTreeMap<PortId, PortCounters>, NetlinkError> {
        let links = link::all(&mut self.slow())?;
        let ours = links
            .iter()
            .filter_map(|link| Some((found_port(link)?.port.id, PortCounters::of(link.statistics))));
        Ok(ours.collect())
    }

    /// Removes the port's tap, even from under a QEMU that holds it. None is fine.
    ///
    /// # Errors
    /// [`PortError::NotOurs`] if something else has its name; it is left alone.
    pub fn remove(&self, id: PortId) -> Result<(), PortError> {
        let Some(found) = self.find_port(id)? else {
            return Ok(());
        };
        match self.slow().execute(&[link::delete(found.port.index)]) {
            Err(error) if error.errno() != Some(Errno::NODEV) => Err(failure(&found.port.tap, "remove")(error)),
            _ => Ok(()),
        }
    }

    /// All taps of ours in this namespace: those that belong to no VM have leaked.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn ports(&self) -> Result<Vec<FoundPort>, NetlinkError> {
        Ok(link::all(&mut self.slow())?.iter().filter_map(found_port).collect())
    }

    fn announce(&self, port: &Port, announcement: &Announcement) {
        for frame in announcement.frames() {
            if let Err(errno) = sys::send_frame(&self.packet, port.bridge_index, frame) {
                tracing::warn!(tap = port.tap, error = %errno, "the port's announcement was not sent");
                return;
            }
        }
    }
}

impl PortCounters {
    /// What the host receives on the tap is what the guest sent.
    pub(crate) fn of(counted: link::Statistics) -> Self {
        Self {
            sent_bytes: counted.rx_bytes,
            sent_frames: counted.rx_packets,
            sent_dropped: counted.rx_dropped,
            received_bytes: counted.tx_bytes,
            received_frames: counted.tx_packets,
            received_dropped: counted.tx_dropped,
        }
    }
}

pub(crate) fn found_port(link: &Link) -> Option<FoundPort> {
    let id = link.alias.strip_prefix(ALIAS_PREFIX)?.parse().ok()?;
    if link.kind != TAP_KIND || link.name != tap_name(id) {
        return None;
    }
    let port = Port {
        id,
        tap: link.name.clone(),
        index: link.index,
        bridge_index: link.master.unwrap_or(0),
    };
    Some(FoundPort {
        port,
        open: link.port_state == Some(PORT_FORWARDING),
    })
}

fn open_tap(tap: &str) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(TUN_DEVICE, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM => TapError::NotPermitted { tap: tap.to_owned() },
        _ => TapError::Device {
            tap: tap.to_owned(),
            source: errno.into(),
        },
    })?;
    sys::make_tap(&fd, tap).map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => TapError::NotPermitted { tap: tap.to_owned() },
        Errno::BUSY | Errno::EXIST => TapError::Exists { tap: tap.to_owned() },
        _ => TapError::Driver {
            tap: tap.to_owned(),
            source: errno.into(),
        },
    })?;
    Ok(fd)
}

/// Reads and drops what is queued.
fn drain(fd: &OwnedFd) -> Result<(), Errno> {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    for _ in 0..QUEUED_FRAMES_MAX {
        match rustix::io::read(fd, frame.as_mut_slice()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

pub(crate) fn failure(tap: &str, step: &'static str) -> impl Fn(NetlinkError) -> PortError {
    move |source| match source.errno() {
        Some(Errno::PERM | Errno::ACCESS) => PortError::NotPermitted {
            tap: tap.to_owned(),
            step,
        },
        Some(Errno::NODEV | Errno::NXIO) => PortError::Gone {
            tap: tap.to_owned(),
            step,
        },
        Some(Errno::NETDOWN | Errno::INVAL | Errno::OPNOTSUPP) => PortError::Detached {
            tap: tap.to_owned(),
            step,
        },
        _ => PortError::Kernel {
            tap: tap.to_owned(),
            step,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn tap_names_fit_the_kernel_and_tell_ids_apart() {
        let ids = [0, u128::MAX, 1, 1 << 61].map(|n| PortId(Uuid::from_u128(n)));
        let names: std::collections::BTreeSet<_> = ids.iter().map(|id| tap_name(*id)).collect();
        assert_eq!(names.len(), ids.len());
        for name in &names {
            assert_eq!(name.len(), 15);
            assert!(name.parse::<InterfaceName>().is_ok(), "{name}");
        }
        assert_eq!(tap_name(PortId(Uuid::from_u128(33))), "gw0000000000011");
    }
}
