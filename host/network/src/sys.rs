//! The system calls that no safe wrapper covers, each in the smallest function.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Switches a netlink socket option on.
#[allow(unsafe_code)]
pub(crate) fn set_netlink_option(socket: impl AsFd, option: libc::c_int) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for the call, and the pointer and length describe the live local `on`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Makes an open `/dev/net/tun` descriptor the tap named `name`, which must be new.
/// Frames carry a virtio-net header, so that QEMU can leave checksums and segmentation to the host.
#[allow(unsafe_code)]
pub(crate) fn make_tap(tun: impl AsFd, name: &str) -> Result<(), Errno> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as i16,
        },
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(Errno::NAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call and is zero-terminated.
    let result = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result >= 0 { Ok(()) } else { Err(last_error()) }
}

/// Sends one Ethernet frame out of interface `index`.
#[allow(unsafe_code)]
pub(crate) fn send_frame(socket: impl AsFd, index: u32, frame: &[u8]) -> Result<(), Errno> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the frame and the address live across the call, with the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_fd().as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if sent >= 0 { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
