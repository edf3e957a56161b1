//! A request's body that its answer did not need is read all the same, within bounds, before the answer goes out.
//!
//! Over HTTP/2 a server that answers early resets the stream of what is still being sent (RFC 9113, 8.1). Clients take the reset for
//! a failure and lose the answer: curl 7.88 says "Stream error in the HTTP/2 framing layer", and never shows the refusal.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody},
    extract::Request,
    http::Version,
    response::Response,
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;

/// What is read and dropped at most; who sends more than this for nothing, or announces it, finds the stream closed.
const UNREAD_BYTES_MAX: u64 = 16 << 20;
/// How long the answer waits for it at most.
const UNREAD_MAX: Duration = Duration::from_secs(2);

/// Answers by `answer`, which may leave the body unread.
pub(super) async fn answered<F: Future<Output = Response>>(
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Response {
    // Over HTTP/1.1 the answer goes out at once, and the connection is closed behind it.
    if request.version() != Version::HTTP_2 || request.body().size_hint().lower() > UNREAD_BYTES_MAX {
        return answer(request).await;
    }
    let (parts, body) = request.into_parts();
    let (back, mut given_back) = oneshot::channel();
    let lent = Lent { body, back: Some(back) };
    let response = answer(Request::from_parts(parts, Body::new(lent))).await;
    // What has not come back is read to its end, or still in use (an upgraded connection).
    if let Ok(body) = given_back.try_recv() {
        // Whatever goes wrong with bytes that nobody wants is no matter.
        let _ = tokio::time::timeout(UNREAD_MAX, dropped(body)).await;
    }
    response
}

async fn dropped(mut body: Body) {
    let mut bytes = 0;
    while bytes <= UNREAD_BYTES_MAX
        && let Some(Ok(frame)) = body.frame().await
    {
        bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
    }
}

/// A body that goes back to its owner when its reader lets it go before the end.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take()
            && !self.body.is_end_stream()
        {
            // Its owner may have gone, with the connection.
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}
