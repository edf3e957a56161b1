//! A refusal reaches its client over HTTP/2 although the request's body was not needed for it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::body::{Body, Bytes};
use futures_util::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::Request;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use support::Api;

const PIECE_BYTES: usize = 64 * 1024;

/// A body of so many pieces that counts those which were asked for.
fn counted(pieces: usize) -> (Body, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let body = stream::repeat_with(move || {
        count.fetch_add(1, Ordering::SeqCst);
        Ok::<_, std::io::Error>(Bytes::from_static(&[b' '; PIECE_BYTES]))
    });
    (Body::from_stream(body.take(pieces)), taken)
}

/// A client's end of an HTTP/2 connection to the interface.
async fn connected(api: &Api) -> hyper::client::conn::http2::SendRequest<Body> {
    let (client, server) = tokio::io::duplex(256 * 1024);
    let service = TowerToHyperService::new(api.router.clone());
    tokio::spawn(async move {
        auto::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(server), service)
            .await
    });
    let (send, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client))
        .await
        .unwrap();
    tokio::spawn(connection);
    send
}

#[tokio::test]
async fn what_is_sent_for_nothing_is_taken_so_that_the_refusal_is_heard() {
    let api = Api::start().await;
    let mut send = connected(&api).await;
    let bearer = format!("Bearer {}", api.token);
    let cases = [
        ("POST", "/v1/nope", bearer.as_str(), 404, "not-found"),
        ("POST", "/v1/vms", "Bearer gwt1.nobody", 401, "unauthenticated"),
        ("PUT", "/v1/blobs/abc", bearer.as_str(), 400, "invalid-input"),
        ("POST", "/v1/vms", bearer.as_str(), 413, "invalid-input"),
    ];
    for (method, path, authorization, status, code) in cases {
        const PIECES: usize = 64;
        let (body, taken) = counted(PIECES);
        let request = Request::builder()
            .method(method)
            .uri(format!("https://controller.example:7443{path}"))
            .header("authorization", authorization)
            .header("content-type", "application/json")
            .header("content-length", PIECES * PIECE_BYTES)
            .body(body)
            .unwrap();
        let answer = send.send_request(request).await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{path}");
        let problem = answer.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&problem).unwrap();
        assert_eq!(problem["code"], code, "{path}");
        // A stream that was reset asks its sender for no more.
        assert_eq!(taken.load(Ordering::SeqCst), PIECES, "{path}: the stream was reset");
    }
    api.stop().await;
}

#[tokio::test]
async fn who_sends_without_end_for_nothing_is_answered_too() {
    let api = Api::start().await;
    let mut send = connected(&api).await;
    let (body, taken) = counted(usize::MAX);
    let request = Request::post("https://controller.example:7443/v1/nope")
        .body(body)
        .unwrap();
    let answer = send.send_request(request).await.unwrap();
    assert_eq!(answer.status().as_u16(), 404);
    assert!(
        taken.load(Ordering::SeqCst) < 1000,
        "not much more is taken than is allowed"
    );
    api.stop().await;
}
