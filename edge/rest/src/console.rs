//! A VM's serial console over an upgraded connection.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, Version, header},
    response::Response,
};
use hyper_util::rt::TokioIo;
use model::{Actor, Code, Refusal, name::Reference};
use tokio::io::{AsyncWriteExt as _, copy_bidirectional};

use crate::{App, CONSOLE_PROTOCOL, failure::Failure};

/// Opens the console first, so that a refusal is still an HTTP answer; then hands the connection over.
pub(crate) async fn open(
    app: &App,
    actor: Actor,
    vm: Reference,
    headers: &HeaderMap,
    mut request: Request,
) -> Result<Response, Failure> {
    if request.version() != Version::HTTP_11 || !asks_for_us(headers) {
        let refusal = Refusal::new(
            Code::InvalidInput,
            "a console needs an HTTP/1.1 connection that is upgraded",
        )
        .hint(format!(
            "send `Connection: Upgrade` and `Upgrade: {CONSOLE_PROTOCOL}` over HTTP/1.1"
        ));
        return Err(Failure::with_status(StatusCode::UPGRADE_REQUIRED, &refusal));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let mut guest = app.handle.console(actor.clone(), vm).await?;
    let handle = app.handle.clone();
    tokio::spawn(async move {
        // The client may leave before the upgrade; the guest's end closes with this task.
        let Ok(upgraded) = upgrade.await else { return };
        let mut client = TokioIo::new(upgraded);
        let ended = tokio::select! {
            ended = copy_bidirectional(&mut client, &mut guest) => Some(ended),
            () = handle.right_ended(&actor) => None,
        };
        tracing::debug!(?ended, "console closed");
        let _ = client.shutdown().await;
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(CONSOLE_PROTOCOL));
    Ok(response)
}

fn asks_for_us(headers: &HeaderMap) -> bool {
    let has = |name, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values
            .flat_map(|value| value.split(','))
            .any(|one| one.trim().eq_ignore_ascii_case(word))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, CONSOLE_PROTOCOL)
}
