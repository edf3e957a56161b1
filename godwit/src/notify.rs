//! Tells the service manager that a server is ready (`sd_notify(3)`): units that follow wait for it.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// Says that this server is ready to whoever asked by `NOTIFY_SOCKET`; nothing where nobody did.
pub(crate) fn ready() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = tell(&socket, b"READY=1") {
        tracing::warn!(socket = %socket.display(), %error, "the service manager was not told that this server is ready");
    }
}

/// A name that begins with `@` is an abstract one.
fn tell(socket: &OsStr, what: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(what, &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_socket_hear_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("godwit-notify-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str().to_owned()),
            (
                UnixDatagram::bind_addr(&abstract_address).unwrap(),
                format!("@{name}").into(),
            ),
        ] {
            tell(&socket, b"READY=1").unwrap();
            let mut heard = [0; 16];
            let count = listener.recv(&mut heard).unwrap();
            assert_eq!(&heard[..count], b"READY=1");
        }
        assert!(tell(OsStr::new("/nowhere/at/all"), b"READY=1").is_err());
    }
}
