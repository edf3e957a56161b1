//! The system calls that no safe wrapper covers, each in the smallest function.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Sets a socket option whose value is a number.
#[allow(unsafe_code)]
pub(crate) fn set_option(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call, and the pointer and length describe the live local `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Lets a socket receive only what the program (classic BPF, checked by the kernel) lets through.
#[allow(unsafe_code)]
pub(crate) fn attach_filter(socket: impl AsFd, program: &mut [libc::sock_filter]) -> Result<(), Errno> {
    let described = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::INVAL)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives across the call, with the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const described).cast(),
            size_of_val(&described) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// Lets a packet socket receive what passes through interface `index`, either way.
#[allow(unsafe_code)]
pub(crate) fn bind_to_interface(socket: impl AsFd, index: u32) -> Result<(), Errno> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let address = link_address(index, protocol);
    // SAFETY: the address lives across the call, with the length given.
    let result = unsafe {
        libc::bind(
            socket.as_fd().as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

/// A message as a socket told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    /// Its whole length, also where the buffer was shorter.
    pub(crate) len: usize,
    /// When it came, µs since 1970, if the socket was asked to tell.
    pub(crate) at_us: Option<i64>,
}

/// Room for the one control message that is asked for, as aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Receives one message without waiting; with `peek` it stays in the queue.
#[allow(unsafe_code)]
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8], peek: bool) -> Result<Told, Errno> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: `msghdr` is numbers and pointers, for all of which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: buffer, control and the structures that point to them live across the call, with the lengths given.
    let len = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
    let len = usize::try_from(len).map_err(|_| last_error())?;
    let mut at_us = None;
    // SAFETY: the kernel filled `control` and its length; the macros stay within them.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: as above; the header is whole where it is not null, and a timestamp's data is one `timespec`, copied unaligned.
    if let Some(header) = unsafe { first.as_ref() }
        && (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS)
    {
        let time: libc::timespec = unsafe { libc::CMSG_DATA(first).cast::<libc::timespec>().read_unaligned() };
        at_us = Some(time.tv_sec * 1_000_000 + time.tv_nsec / 1000);
    }
    Ok(Told { len, at_us })
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

/// Moves the calling thread into a new network namespace, which goes away with it.
#[allow(unsafe_code)]
pub(crate) fn new_network_namespace() -> Result<(), Errno> {
    // SAFETY: only the network namespace is unshared, which changes no memory or descriptor of other threads.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
}

/// Sends one Ethernet frame out of interface `index`; before it the header that the socket was told to expect, if any.
#[allow(unsafe_code)]
pub(crate) fn send_frame(socket: impl AsFd, index: u32, frame: &[u8]) -> Result<(), Errno> {
    let address = link_address(index, 0);
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

fn link_address(index: u32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
