//! From an address to an HTTP connection: TCP, TLS with the pinned authority, and the protocol that is wanted.

use std::{sync::Arc, time::Duration};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::client::TlsStream;

use super::{Body, locate::Server};
use crate::exit::{Exit, Failure, chain};

/// Longest wait for a connection, and for its TLS handshake.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// The connection is asked for a sign of life after this much silence, and given up after that much more.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Bytes that the server may send before they are read.
const WINDOW_BYTES: u32 = 1 << 20;

/// A connection for many requests.
pub(super) async fn http2(server: &Server) -> Result<http2::SendRequest<Body>, Failure> {
    let stream = tls(server, b"h2").await?;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(4 * WINDOW_BYTES);
    let (sender, connection) = builder
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| not_http(server, &error))?;
    // Its end shows in the requests.
    tokio::spawn(connection);
    Ok(sender)
}

/// A connection that one request will take over.
pub(super) async fn http1(server: &Server) -> Result<http1::SendRequest<Body>, Failure> {
    let stream = tls(server, b"http/1.1").await?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|error| not_http(server, &error))?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

async fn tls(server: &Server, protocol: &[u8]) -> Result<TlsStream<TcpStream>, Failure> {
    let address = &server.address;
    let unreachable = |why: String| {
        Failure::new(
            Exit::Unreachable,
            format!("cannot reach the server at {address}: {why}"),
        )
        .hint(format!(
            "is the controller running there? The address is from {}",
            server.address_from
        ))
    };
    let stream = timeout(CONNECT_MAX, TcpStream::connect((address.host.as_str(), address.port))).await;
    let stream = stream.map_err(|_| unreachable(format!("no answer within {} s", CONNECT_MAX.as_secs())))?;
    let stream = stream.map_err(|error| unreachable(chain(&error)))?;
    // Small requests must not wait for each other.
    let _ = stream.set_nodelay(true);
    let not_it = |error: &dyn std::error::Error| {
        let message = format!(
            "what answers at {address} is not the server of this authority: {}",
            chain(error)
        );
        Failure::new(Exit::Unreachable, message).hint(format!(
            "check the address; the authority is from {}",
            server.authority_from
        ))
    };
    let mut config = identity::tls::to_api(&server.authority).map_err(|error| not_it(&error))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from(address.host.clone()).map_err(|error| not_it(&error))?;
    let connected = identity::tls::connect(&Arc::new(config), name, stream, CONNECT_MAX).await;
    connected.map_err(|error| match &error {
        identity::tls::TlsError::Handshake(cause) if hung_up(cause) => {
            Failure::new(Exit::Unreachable, format!("the server at {address} closed the connection before it said who it is"))
                .hint("it may have too many connections, or be starting or stopping: try again in some seconds; is it a controller's port for clients?")
        }
        identity::tls::TlsError::Deadline(_) => unreachable(chain(&error)),
        _ => not_it(&error),
    })
}

/// Whether the other side ended the connection without a word.
fn hung_up(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe
    )
}

fn not_http(server: &Server, error: &hyper::Error) -> Failure {
    let message = format!(
        "the server at {} does not speak HTTP as godwit does: {}",
        server.address,
        chain(error)
    );
    Failure::new(Exit::Unreachable, message).hint("check the address and port")
}
