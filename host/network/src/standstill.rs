//! What a guest misses while it stands for a move: kept on the host that it leaves, given to it on the host where it runs on.
//!
//! ```text
//!   source                                              destination
//!   bridge ──▶ tap ──▶ QEMU, which reads no more        bridge ──▶ tap ──▶ QEMU
//!               └─copy─▶ Keeper ─── the agents' link ───▶ give_frame ─▲   past the bridge
//! ```
//!
//! A copy is taken of what the bridge sends out by the tap (packet(7)), not what the tap's queue holds: QEMU takes one more frame
//! from that queue when its guest already stands, and would take it to its grave. So the tap has no further holder, the kernel's queue
//! length is no bound, and QEMU finds all of it still there when the guest runs on where it was.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use model::Mac;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt},
};

use crate::{Network, Port, sys};

/// Bytes of the `virtio_net_hdr` before each frame (virtio 1.2, section 5.1.6, without `num_buffers`), little-endian.
pub const VIRTIO_HEADER_BYTES: usize = 10;
/// The longest frame that is kept or given, its virtio header included: 64 KiB for the receiving end to segment, and headers.
pub const FRAME_BYTES_MAX: usize = 66 << 10;
/// What the kernel holds for a keeper; it counts each frame with its own bookkeeping, and twice this.
const HELD_BYTES_MAX: usize = 4 << 20;
/// Frames that one call of [`Keeper::forget_before`] passes over.
const FORGOTTEN_AT_ONCE_MAX: usize = 4096;

/// A frame on its way to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptFrame {
    /// When the bridge sent it out to the guest, by this host's wall clock, µs since 1970.
    pub at_us: i64,
    /// Its virtio header, then the Ethernet frame.
    pub bytes: Vec<u8>,
}

impl KeptFrame {
    /// Whether it is for several: such a frame also reaches every other port of its network that is open.
    #[must_use]
    pub fn is_for_many(&self) -> bool {
        self.bytes.get(VIRTIO_HEADER_BYTES).is_some_and(|first| first & 1 != 0)
    }
}

/// Why a port's frames are not kept, or cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The caller may not.
    #[error("not permitted to {step} port {tap}; run the agent as root or with CAP_NET_RAW")]
    NotPermitted {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
    },
    /// The tap is gone.
    #[error("cannot {step} port {tap}: it is gone, and with it the QEMU that held it")]
    Gone {
        /// The tap.
        tap: String,
        /// What was being done.
        step: &'static str,
    },
    /// What was to be given is no frame.
    #[error(
        "a frame of {len} bytes cannot be given to port {tap}; a virtio header, an Ethernet header and at most {FRAME_BYTES_MAX} in all are"
    )]
    Length {
        /// The tap.
        tap: String,
        /// Its length, bytes.
        len: usize,
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
        source: io::Error,
    },
}

/// Keeps a copy of every frame that is sent out by a port to its guest from now on: to its MAC or to many, not from its own MAC (its
/// own announcements from elsewhere), and without a VLAN tag. Where more than the kernel holds (4 MiB of its own counting, twice) wait
/// the newer ones are lost. Closing it waits for other processors to let go of it, some 10 ms.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    buffer: Vec<u8>,
    ended: bool,
}

impl Network {
    /// Begins to keep what is sent to a guest. Some system calls, no waiting; to be called in the network's own namespace.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn keep_frames(&self, port: &Port, mac: Mac) -> Result<Keeper, FrameError> {
        let fail = failure(&port.tap, "keep the frames of");
        let socket = packet_socket().map_err(&fail)?;
        sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1).map_err(&fail)?;
        sockopt::set_socket_recv_buffer_size_force(&socket, HELD_BYTES_MAX).map_err(&fail)?;
        sys::attach_filter(&socket, &mut to_guest(mac.0)).map_err(&fail)?;
        // Last: from here on it receives.
        sys::bind_to_interface(&socket, port.index).map_err(&fail)?;
        Ok(Keeper {
            socket,
            buffer: vec![0; FRAME_BYTES_MAX],
            ended: false,
        })
    }

    /// Puts a frame, with its virtio header, into the queue of a port's guest. No other port sees it: in the bridge it would teach
    /// switches that its sender is here. A full queue drops it, as any port does.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn give_frame(&self, port: &Port, frame: &[u8]) -> Result<(), FrameError> {
        if !(VIRTIO_HEADER_BYTES + ETHERNET_HEADER_BYTES..=FRAME_BYTES_MAX).contains(&frame.len()) {
            return Err(FrameError::Length {
                tap: port.tap.clone(),
                len: frame.len(),
            });
        }
        match sys::send_frame(&self.giving, port.index, frame) {
            // The queue is full: see above.
            Ok(()) | Err(Errno::NOBUFS | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(failure(&port.tap, "give a frame to")(errno)),
        }
    }
}

/// A packet socket that receives nothing yet, whose frames carry a virtio header.
pub(crate) fn packet_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    sys::set_option(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
    Ok(socket)
}

impl Keeper {
    /// Passes over what came before a moment (µs since 1970), at most some thousands of frames at once.
    ///
    /// # Errors
    /// Of the socket.
    pub fn forget_before(&mut self, at_us: i64) -> io::Result<()> {
        // No more than this is copied out of what is passed over.
        let mut header = [0; VIRTIO_HEADER_BYTES];
        for _ in 0..FORGOTTEN_AT_ONCE_MAX {
            match self.told(&mut header, true)? {
                Some(told) if told.at_us.is_some_and(|came| came < at_us) => {
                    self.told(&mut header, false)?;
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// The oldest frame that waits; `None` when none does now.
    ///
    /// # Errors
    /// Of the socket.
    pub fn next_frame(&mut self) -> io::Result<Option<KeptFrame>> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let told = loop {
            match self.told(&mut buffer, false) {
                // Longer than any that could be given.
                Ok(Some(told)) if told.len > buffer.len() => {}
                told => break told,
            }
        };
        let frame = told.map(|told| {
            told.map(|told| KeptFrame {
                at_us: told.at_us.unwrap_or(i64::MAX),
                bytes: buffer[..told.len].to_vec(),
            })
        });
        self.buffer = buffer;
        frame
    }

    /// Whether the port is gone: what waits now is the last.
    #[must_use]
    pub const fn is_ended(&self) -> bool {
        self.ended
    }

    fn told(&mut self, buffer: &mut [u8], peek: bool) -> io::Result<Option<sys::Told>> {
        loop {
            match sys::receive(&self.socket, buffer, peek) {
                Ok(told) => return Ok(Some(told)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                // Told once; what was received before can still be read.
                Err(Errno::NETDOWN) => self.ended = true,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Keeper {
    /// Readable when a frame waits; in error once the port is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// `linux/if_packet.h`; the crate `libc` has it for few targets only.
const PACKET_VNET_HDR: libc::c_int = 15;
const ETHERNET_HEADER_BYTES: usize = 14;

/// A classic BPF program for what the bridge sends out to a guest; see [`Keeper`].
fn to_guest(mac: [u8; 6]) -> [libc::sock_filter; 16] {
    const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const IF_SET: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const MANY: u32 = 1;
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    let vlan_tag = (libc::SKF_AD_OFF + libc::SKF_AD_VLAN_TAG_PRESENT) as u32;
    let [a, b, c, d, e, f] = mac;
    let (head, tail) = (u32::from_be_bytes([a, b, c, d]), u32::from(u16::from_be_bytes([e, f])));
    let step = |code: u32, k, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    // Jumps count the steps that they pass over; the last but one step takes a frame, the last drops it.
    [
        step(LOAD_WORD, packet_type, 0, 0),
        step(IF_EQUAL, u32::from(libc::PACKET_OUTGOING), 0, 13),
        step(LOAD_WORD, vlan_tag, 0, 0),
        step(IF_EQUAL, 0, 0, 11),
        step(LOAD_WORD, 6, 0, 0),
        step(IF_EQUAL, head, 0, 2),
        step(LOAD_HALF, 10, 0, 0),
        step(IF_EQUAL, tail, 7, 0),
        step(LOAD_BYTE, 0, 0, 0),
        step(IF_SET, MANY, 4, 0),
        step(LOAD_WORD, 0, 0, 0),
        step(IF_EQUAL, head, 0, 3),
        step(LOAD_HALF, 4, 0, 0),
        step(IF_EQUAL, tail, 0, 1),
        step(RETURN, u32::MAX, 0, 0),
        step(RETURN, 0, 0, 0),
    ]
}

pub(crate) fn failure(tap: &str, step: &'static str) -> impl Fn(Errno) -> FrameError {
    move |errno| match errno {
        Errno::PERM | Errno::ACCESS => FrameError::NotPermitted {
            tap: tap.to_owned(),
            step,
        },
        Errno::NODEV | Errno::NXIO => FrameError::Gone {
            tap: tap.to_owned(),
            step,
        },
        errno => FrameError::Kernel {
            tap: tap.to_owned(),
            step,
            source: errno.into(),
        },
    }
}
