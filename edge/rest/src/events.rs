//! `/v1/events`: the cell's notices and operations' progress as server-sent events, resumable.

use std::{convert::Infallible, task::Poll, time::Duration};

use axum::{
    extract::State,
    http::HeaderMap,
    response::sse::{Event, KeepAlive, Sse},
};
use controller::WatchItem;
use futures_util::{Stream, StreamExt as _, stream};
use model::{OperationId, Sequence, operation::Progress};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use wire::Problem;

use crate::{App, extract::Read, failure::Failure};

/// A comment is sent after this much silence, so that both ends learn of a cut.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// From where on.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct After {
    /// The sequence number of the last event that was seen; without it, from now on. `Last-Event-ID` goes before it.
    after: Option<u64>,
    /// Whether to go on with what happens from now on; otherwise the stream ends with what has happened.
    #[serde(default = "yes")]
    #[param(default = true)]
    follow: bool,
}

const fn yes() -> bool {
    true
}

/// How far an operation is: the data of an event `progress`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProgressEvent {
    /// The operation.
    operation: OperationId,
    /// How far.
    progress: Progress,
}

/// Notices (event `notice`, with its sequence number for id), progress (event `progress`, without id) and gaps (event `lagged`:
/// some notices are no longer kept; read anew what you follow). Resumes after `Last-Event-ID`.
#[utoipa::path(get, path = "/v1/events", tag = "events",
    params(After, ("Last-Event-ID" = Option<u64>, Header, description = "the last event that was seen")),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = "4XX", body = Problem)))]
pub(crate) async fn follow(
    State(app): State<App>,
    Read(actor, After { after, follow }): Read<After>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let after = match headers.get("last-event-id") {
        None => after,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
            let wrong = || {
                Failure::input(
                    "Last-Event-ID is not the id of an event of this server",
                    "leave it out to begin now",
                )
            };
            Some(number.ok_or_else(wrong)?)
        }
    };
    let told = app.handle.watch(actor, after.map(Sequence));
    let told = if follow {
        told.left_stream()
    } else {
        happened(told).right_stream()
    };
    let events = told.map(|item| Ok(event(item)));
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)))
}

/// What is there without waiting. The scheduler's budget is left aside: used up, it would look like an end.
fn happened(mut told: impl Stream<Item = WatchItem> + Unpin) -> impl Stream<Item = WatchItem> {
    stream::poll_fn(move |context| {
        let next = std::pin::pin!(tokio::task::unconstrained(told.next())).poll(context);
        match next {
            Poll::Ready(item) => Poll::Ready(item),
            Poll::Pending => Poll::Ready(None),
        }
    })
}

fn event(item: WatchItem) -> Event {
    let (event, data) = match item {
        WatchItem::Notice(notice) => {
            let event = Event::default().event("notice").id(notice.sequence.to_string());
            (event, serde_json::to_string(&*notice))
        }
        WatchItem::Progress { operation, progress } => {
            let data = ProgressEvent { operation, progress };
            (Event::default().event("progress"), serde_json::to_string(&data))
        }
        WatchItem::Lagged { at } => {
            let event = Event::default().event("lagged").id(at.to_string());
            (event, serde_json::to_string(&serde_json::json!({ "at": at })))
        }
    };
    // JSON has no line breaks of its own, which an event's data may not have.
    event.data(data.unwrap_or_default())
}
