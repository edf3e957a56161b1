//! Serving HTTP over TLS within bounds: connections, handshakes, silence, headers, streams.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo};
use hyper::{Request, body::Incoming, server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use model::HostId;
use rustix::net::sockopt;
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::server::TlsStream;
use tower::ServiceExt as _;

use crate::{
    admission::{Admission, Place},
    metrics::Metrics,
};

/// Longest TLS handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Longest wait for the first request of a connection, and for the headers of each.
const HEADERS_MAX: Duration = Duration::from_secs(10);

/// Longest headers, bytes.
const HEADERS_BYTES_MAX: u32 = 32 << 10;

/// An HTTP/2 connection is asked for a sign of life after this much silence, and closed after that much more.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A peer that says nothing for so long is asked by TCP whether it is there: an upgraded connection has no other sign of life.
const IDLE: Duration = Duration::from_secs(30);

/// Between two such questions.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// Questions without an answer after which the connection is closed.
const ASK_MAX: u32 = 3;

/// How long what was sent may stay unacknowledged.
const UNHEARD_MAX: Duration = Duration::from_secs(60);

/// Requests at a time on an HTTP/2 connection.
const STREAMS_MAX: u32 = 128;

/// How long requests under way may take when the server is told to stop.
const STOPPING_MAX: Duration = Duration::from_secs(5);

/// A port and how it is served.
pub(crate) struct Port {
    pub(crate) listener: TcpListener,
    /// Replaced before the certificate in it expires; each connection takes the newest.
    pub(crate) tls: watch::Receiver<Arc<ServerConfig>>,
    pub(crate) router: Router,
    /// Whether each client is a host, by its certificate; its id is then an extension of each request.
    pub(crate) hosts_only: bool,
    pub(crate) connections_max: usize,
    pub(crate) metrics: Arc<Metrics>,
    /// Becomes true when the server is to stop.
    pub(crate) stop: watch::Receiver<bool>,
}

impl Port {
    /// Serves until told to stop, then lets requests under way end.
    pub(crate) async fn serve(mut self) {
        // Dropped with this future: no connection outlives its server.
        let mut connections = JoinSet::new();
        let admission = Admission::new(self.connections_max);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                _ = self.stop.wait_for(|stop| *stop) => break,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: closing connections will free some.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some(place) = admission.admit(peer.ip()) else {
                self.metrics.connections_refused.inc();
                continue;
            };
            let number = place.number();
            let (tls, router) = (self.tls.borrow().clone(), self.router.clone());
            let (stop, hosts_only) = (self.stop.clone(), self.hosts_only);
            let task = connections.spawn(async move {
                if let Some(connection) = Connection::accept(stream, peer, &tls, hosts_only).await {
                    connection.serve(router, stop, place).await;
                }
            });
            admission.ends_by(number, task);
        }
        drop(self.listener);
        let ended = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(STOPPING_MAX, ended).await;
    }
}

struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    host: Option<HostId>,
}

impl Connection {
    async fn accept(stream: TcpStream, peer: SocketAddr, tls: &Arc<ServerConfig>, hosts_only: bool) -> Option<Self> {
        if let Err(error) = notice_loss(&stream) {
            tracing::debug!(%peer, %error, "a connection could not be set up");
            return None;
        }
        let stream = identity::tls::accept(tls, stream, HANDSHAKE_MAX)
            .await
            .inspect_err(|error| tracing::debug!(%peer, error = ?error, "handshake failed"))
            .ok()?;
        let host = if hosts_only {
            match identity::tls::peer_of(&stream).ok()?.role {
                identity::Role::Host(id) => Some(HostId(id)),
                identity::Role::Controller => return None,
            }
        } else {
            None
        };
        Some(Self { stream, peer, host })
    }

    /// Serves it; it has its place until its end.
    async fn serve(self, router: Router, stop: watch::Receiver<bool>, place: Place) {
        let (seen, first_request) = watch::channel(false);
        let (peer, host) = (self.peer, self.host);
        let service = service_fn(move |mut request: Request<Incoming>| {
            seen.send_replace(true);
            request.extensions_mut().insert(ConnectInfo(peer));
            if let Some(host) = host {
                request.extensions_mut().insert(host);
            }
            router.clone().oneshot(request.map(axum::body::Body::new))
        });
        let run = Run {
            first_request,
            stop,
            peer,
            place,
        };
        let http2 = self.stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(self.stream);
        if http2 {
            let mut builder = conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .max_concurrent_streams(STREAMS_MAX)
                .max_header_list_size(HEADERS_BYTES_MAX);
            let connection = builder.serve_connection(io, service);
            run.until_its_end(connection, |connection| connection.graceful_shutdown())
                .await;
        } else {
            let mut builder = conn::http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS_MAX)
                .max_buf_size(HEADERS_BYTES_MAX as usize);
            let connection = builder.serve_connection(io, service).with_upgrades();
            run.until_its_end(connection, |connection| connection.graceful_shutdown())
                .await;
        }
    }
}

/// A peer that vanishes without a word, as a laptop that is switched off, is noticed within a minute.
fn notice_loss(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, IDLE)?;
    sockopt::set_tcp_keepintvl(stream, ASK_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, ASK_MAX)?;
    let unheard = u32::try_from(UNHEARD_MAX.as_millis()).unwrap_or(u32::MAX);
    Ok(sockopt::set_tcp_user_timeout(stream, unheard)?)
}

/// What a connection is watched for while it runs.
struct Run {
    first_request: watch::Receiver<bool>,
    stop: watch::Receiver<bool>,
    peer: SocketAddr,
    place: Place,
}

impl Run {
    /// Ends the connection when no request comes in time; tells it to end when the server is to stop.
    async fn until_its_end<C, E>(mut self, connection: C, mut graceful: impl FnMut(Pin<&mut C>))
    where
        C: Future<Output = Result<(), E>>,
        E: std::fmt::Display,
    {
        tokio::pin!(connection);
        let first = tokio::time::timeout(HEADERS_MAX, self.first_request.wait_for(|seen| *seen));
        tokio::pin!(first);
        let (mut waiting, mut stopping) = (true, false);
        let peer = self.peer;
        loop {
            tokio::select! {
                end = &mut connection => {
                    if let Err(error) = end {
                        tracing::debug!(%peer, %error, "connection ended");
                    }
                    return;
                }
                in_time = &mut first, if waiting => {
                    waiting = false;
                    if in_time.is_err() {
                        tracing::debug!(%peer, "no request in time");
                        return;
                    }
                    self.place.proven();
                }
                _ = self.stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    graceful(connection.as_mut());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_vanishes_without_a_word_is_noticed_within_a_minute() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        notice_loss(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let asked = sockopt::tcp_keepintvl(&stream).unwrap() * sockopt::tcp_keepcnt(&stream).unwrap();
        let idle = sockopt::tcp_keepidle(&stream).unwrap() + asked;
        assert!(idle <= Duration::from_secs(60), "{idle:?}");
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 60_000);
    }
}
