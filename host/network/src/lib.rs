//! What an agent needs of its host's network: bridges, one tap a port, the moment at which a port opens, and what a guest missed
//! before it.
//!
//! ```text
//!            guest              another host
//!              |                     |
//!   QEMU holds the tap's fd      switch, uplink
//!              |                     |
//!        [tap gw3k0...]---bridge---[uplink]
//!          blocked | open     \
//!                              gateway address (optional)
//! ```
//!
//! Invariants:
//! - A port is born blocked: nothing passes, in either direction, until [`Network::open_port`]. Opening lies inside the
//!   blackout of a migration, so it is one datagram to the kernel that changes a field: no link goes up, nothing settles.
//! - A tap lives exactly as long as somebody holds its descriptor. When QEMU dies the tap goes with it, agent or not.
//! - What this crate did not make it does not change: interfaces of ours carry an alias that says so, with the port's id.
//! - Everything is idempotent, and a failed call leaves nothing behind.
//!
//! Calls block for microseconds, or for as long as another process holds the kernel's network configuration lock (bounded
//! by 10 s). They act in the network namespace in which [`Network::open`] was called; [`Network::create_tap`] must be
//! called from a thread in that same namespace.

mod announce;
mod bridge;
mod limit;
mod link;
mod name;
mod netlink;
mod nft;
mod policy;
mod port;
mod questions;
mod standstill;
mod sys;
mod traffic;
mod trial;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

pub use announce::Announcement;
pub use bridge::{Bridge, BridgeError, BridgeSpec, Gateway};
pub use name::{InterfaceName, NameError};
pub use netlink::NetlinkError;
pub use nft::NftError;
pub use policy::{Drops, Identity, PolicyError, SweepError};
pub use port::{FoundPort, Port, PortCounters, PortError, Tap, TapError, tap_name};
pub use questions::{Answered, Questions};
pub use standstill::{FRAME_BYTES_MAX, FrameError, Keeper, KeptFrame, VIRTIO_HEADER_BYTES};
pub use traffic::{Traffic, UplinkCounters};
pub use trial::{LinkKind, LinkTrialError, Throwaway, TrialError, in_throwaway_namespace};

use netlink::Netlink;
use nft::Nft;

/// Why the host's network cannot be managed at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The route-netlink socket could not be opened.
    #[error("cannot open a netlink socket to the kernel; is the agent's sandbox forbidding AF_NETLINK?")]
    Netlink(#[source] NetlinkError),
    /// The packet socket could not be opened.
    #[error("cannot open a packet socket, with which ports are announced; run the agent as root or with CAP_NET_RAW")]
    Packet(#[source] io::Error),
}

/// The network of this host, or of the namespace in which it was opened.
#[derive(Debug)]
pub struct Network {
    /// For everything that may take long, such as listings.
    slow: Mutex<Netlink>,
    /// For opening and blocking ports alone, so that they never wait behind a listing.
    fast: Mutex<Netlink>,
    packet: OwnedFd,
    /// For frames with a virtio header that are given to a guest.
    giving: OwnedFd,
    nft: Nft,
}

impl Network {
    /// Opens the sockets, in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`OpenError`] without the privileges or the kernel parts needed.
    pub fn open() -> Result<Self, OpenError> {
        let packet = socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(|errno| OpenError::Packet(errno.into()))?;
        Ok(Self {
            slow: Mutex::new(Netlink::open().map_err(OpenError::Netlink)?),
            fast: Mutex::new(Netlink::open().map_err(OpenError::Netlink)?),
            packet,
            giving: standstill::packet_socket().map_err(|errno| OpenError::Packet(errno.into()))?,
            nft: Nft::find(),
        })
    }

    // A panic while the lock was held leaves at most unread answers, which are told apart by their sequence numbers.
    fn slow(&self) -> MutexGuard<'_, Netlink> {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fast(&self) -> MutexGuard<'_, Netlink> {
        self.fast.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
