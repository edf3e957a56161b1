//! A stranger at a port: bytes that mean nothing, TLS without a certificate, or with one that is not for this port. All that
//! may happen is that the connection closes.

use anyhow::{Context, Result, bail, ensure};
use identity::{CaCertificate, NodeIdentity};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// A port closes a stranger's connection within this.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a stranger comes.
#[derive(Clone, Debug)]
pub enum Guise {
    /// Without TLS.
    Plain,
    /// TLS, trusting the cluster's authority, without a certificate.
    Nameless(Arc<ClientConfig>),
    /// TLS with the certificate of a host of the cluster.
    Host(Arc<ClientConfig>),
}

impl Guise {
    /// TLS without a certificate, towards a controller of the cluster whose authority is in this file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn nameless(authority: &Path) -> Result<Guise> {
        let pem = std::fs::read(authority).with_context(|| format!("cannot read {}", authority.display()))?;
        let authority = CaCertificate::from_pem(&pem).context("not a certificate")?;
        let config = identity::tls::joining(authority.fingerprint()).context("cannot set up TLS")?;
        Ok(Guise::Nameless(Arc::new(config)))
    }

    /// The host whose state directory this is, towards another.
    ///
    /// # Errors
    /// When it has no identity.
    pub fn host(state: &Path, towards: Uuid) -> Result<Guise> {
        let identity = NodeIdentity::load(&state.join("identity.pem")).context("the host has no identity")?;
        let config = identity::tls::to_host(&identity, towards).context("cannot set up TLS")?;
        Ok(Guise::Host(Arc::new(config)))
    }

    /// Comes, says these bytes, and waits until it is shown the door.
    ///
    /// # Errors
    /// When it is answered with anything, or left standing.
    pub fn is_turned_away(&self, address: SocketAddr, says: &[u8]) -> Result<()> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("cannot connect to {address}"))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("cannot set a timeout")?;
        stream
            .set_write_timeout(Some(PATIENCE))
            .context("cannot set a timeout")?;
        let answer = match self {
            Guise::Plain => answer(stream, says, true),
            Guise::Nameless(config) | Guise::Host(config) => {
                let name = ServerName::IpAddress(address.ip().into());
                let connection = ClientConnection::new(config.clone(), name).context("cannot begin TLS")?;
                answer(StreamOwned::new(connection, stream), says, false)
            }
        }?;
        let shown = String::from_utf8_lossy(&answer);
        ensure!(answer.is_empty(), "{address} answers a stranger: {shown:?}");
        Ok(())
    }
}

/// What comes back until the connection ends. Without TLS an alert of TLS is no answer.
fn answer(mut stream: impl Read + Write, says: &[u8], alerts: bool) -> Result<Vec<u8>> {
    // Who is refused in the handshake cannot say anything.
    let _ = stream.write_all(says).and_then(|()| stream.flush());
    let mut bytes = Vec::new();
    match (&mut stream).take(64 << 10).read_to_end(&mut bytes) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            bail!("the connection stays open for {} s", PATIENCE.as_secs())
        }
        // A reset or an alert is a closed door too.
        _ => {}
    }
    // Content type 21, version 3.x (RFC 8446, 5.1).
    let is_alert = alerts && bytes.starts_with(&[0x15, 0x03]);
    Ok(if is_alert { Vec::new() } else { bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn port_that(answers: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 4];
            stream.read_exact(&mut asked).unwrap();
            stream.write_all(answers).unwrap();
        });
        address
    }

    #[test]
    fn a_closed_door_and_an_alert_are_well_and_an_answer_is_not() {
        assert!(Guise::Plain.is_turned_away(port_that(b""), b"ping").is_ok());
        assert!(
            Guise::Plain
                .is_turned_away(port_that(&[0x15, 3, 3, 0, 2, 2, 50]), b"ping")
                .is_ok()
        );
        assert!(Guise::Plain.is_turned_away(port_that(b"pong"), b"ping").is_err());
    }
}
