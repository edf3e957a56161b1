//! The interface's port: a router of the edge's, over TLS, within bounds.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of tests may panic as tests do"
)]

mod support;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo, routing::get};
use identity::CaCertificate;
use rustls::pki_types::ServerName;
use support::{Cell, PATIENCE};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::client::TlsStream;

fn router() -> Router {
    Router::new().route(
        "/",
        get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.to_string() }),
    )
}

async fn serving() -> (Cell, SocketAddr) {
    let mut cell = Cell::start().await;
    cell.controller().serve_api(router());
    let address = cell.controller().api_address();
    (cell, address)
}

async fn connect(cell: &Cell, address: SocketAddr, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
    let authority = CaCertificate::from_pem(&std::fs::read(cell.state().ca_certificate()).unwrap()).unwrap();
    let mut config = identity::tls::to_api(&authority).unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let name = ServerName::IpAddress(address.ip().into());
    let stream = TcpStream::connect(address).await.unwrap();
    identity::tls::connect(&Arc::new(config), name, stream, PATIENCE)
        .await
        .unwrap()
}

/// Everything until the server closes.
async fn rest(stream: &mut TlsStream<TcpStream>) -> String {
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_client_of_http_1_is_answered_and_its_address_is_known() {
    let (cell, address) = serving().await;
    let mut stream = connect(&cell, address, &[b"http/1.1"]).await;
    let own = stream.get_ref().0.local_addr().unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let answer = rest(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with(&own.to_string()),
        "{answer}"
    );
}

#[tokio::test]
async fn a_request_that_two_servers_would_read_in_two_ways_smuggles_no_second_one() {
    let (cell, address) = serving().await;
    for request in [
        // Both lengths: one answer by the chunks, then the connection is closed (RFC 9112, section 6.1).
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
        "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, x\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    ] {
        let mut stream = connect(&cell, address, &[b"http/1.1"]).await;
        let smuggled = format!("{request}GET / HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(smuggled.as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(
            answer.starts_with("HTTP/1.1 4") && answer.matches("HTTP/1.1").count() == 1,
            "{request}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_client_of_http_2_is_answered() {
    use http_body_util::{BodyExt as _, Empty};
    let (cell, address) = serving().await;
    let stream = connect(&cell, address, &[b"h2"]).await;
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut requests, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("https://x/")
        .body(Empty::<axum::body::Bytes>::new())
        .unwrap();
    let answer = requests.send_request(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    // Told to stop, the server lets the client end in good order.
    let mut cell = cell;
    cell.controller.take().unwrap().stop().await;
    timeout(PATIENCE, connection).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn slow_and_silent_clients_are_closed_while_others_are_served() {
    let (cell, address) = serving().await;
    let begun = Instant::now();
    let mut slow_header = connect(&cell, address, &[b"http/1.1"]).await;
    slow_header.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    let mut silent_2 = connect(&cell, address, &[b"h2"]).await;
    let mut silent_tcp = TcpStream::connect(address).await.unwrap();
    let served = async {
        let mut stream = connect(&cell, address, &[b"http/1.1"]).await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .unwrap();
        assert!(rest(&mut stream).await.starts_with("HTTP/1.1 200"));
    };
    timeout(Duration::from_secs(5), served).await.unwrap();
    let mut rest_of_tcp = Vec::new();
    let (slow, _, _) = tokio::join!(
        rest(&mut slow_header),
        rest(&mut silent_2),
        timeout(PATIENCE, silent_tcp.read_to_end(&mut rest_of_tcp))
    );
    assert!(!slow.starts_with("HTTP/1.1 200"));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}
