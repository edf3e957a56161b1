//! `/v1/operations`: slow work, how far it is, and waiting for its end.

use std::time::Duration;

use axum::{Json, extract::State, response::Response};
use controller::WatchItem;
use futures_util::StreamExt as _;
use model::{
    Actor, Code, Command, Operation, OperationId, Refusal,
    query::{Listing, OperationView, Query, View},
};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;
use wire::Problem;

use crate::{
    App,
    extract::{Asked, Choices, Id, NoBody, Pages, Read},
    failure::Failure,
    inventory::unexpected,
    outcome::submit,
};

/// Longest that one request waits; ask again to wait longer.
const WAIT_MAX_S: u32 = 60;

/// How long to wait.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Waiting {
    /// Seconds; the operation is answered as it is then.
    #[param(minimum = 0, maximum = 60, default = 30)]
    timeout_s: Option<u32>,
}

/// Operations, the newest first.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", params(Pages),
    responses((status = 200, body = Listing<OperationView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<OperationView>>, Failure> {
    match app.handle.read(actor, Query::Operations(pages.page()?)).await? {
        View::Operations(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One operation.
#[utoipa::path(get, path = "/v1/operations/{operation}", tag = "operations", params(("operation" = String, Path)),
    responses((status = 200, body = OperationView), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Id(id): Id,
    Read(actor, _): Read,
) -> Result<Json<OperationView>, Failure> {
    view(&app, actor, OperationId(id)).await.map(Json)
}

async fn view(app: &App, actor: Actor, id: OperationId) -> Result<OperationView, Failure> {
    match app.handle.read(actor, Query::Operation(id)).await? {
        View::Operation(view) => Ok(*view),
        _ => Err(unexpected()),
    }
}

/// Gives an operation up.
#[utoipa::path(post, path = "/v1/operations/{operation}/cancel", tag = "operations",
    params(("operation" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn cancel(State(app): State<App>, Id(id): Id, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(
        &app,
        asked.actor,
        Command::CancelOperation(OperationId(id)),
        asked.options,
    )
    .await
}

/// Waits for the end of an operation, for a while; answers with the operation as it is then, over or not.
#[utoipa::path(get, path = "/v1/operations/{operation}/wait", tag = "operations",
    params(("operation" = String, Path), Waiting),
    responses((status = 200, body = OperationView), (status = "4XX", body = Problem)))]
pub(crate) async fn wait(
    State(app): State<App>,
    Id(id): Id,
    Read(actor, waiting): Read<Waiting>,
) -> Result<Json<OperationView>, Failure> {
    let timeout_s = waiting.timeout_s.unwrap_or(30);
    if timeout_s > WAIT_MAX_S {
        let message = format!("timeout_s is {timeout_s}; one request waits at most {WAIT_MAX_S} s");
        return Err(Failure::input(message, "ask again while the operation runs"));
    }
    let (id, until) = (
        OperationId(id),
        Instant::now() + Duration::from_secs(u64::from(timeout_s)),
    );
    // Watched from before it is read: an end in between is not missed.
    let mut told = app.handle.watch(actor.clone(), None);
    loop {
        let seen = view(&app, actor.clone(), id).await?;
        if seen.operation.state.is_over() {
            return Ok(Json(seen));
        }
        loop {
            match timeout_at(until, told.next()).await {
                Err(_) => return view(&app, actor, id).await.map(Json),
                Ok(None) => {
                    let refusal = Refusal::new(Code::Overloaded, "the controller is stopping");
                    return Err(refusal.hint("ask again; operations survive").into());
                }
                Ok(Some(WatchItem::Notice(notice))) if notice.operation == Some(id) => break,
                Ok(Some(WatchItem::Lagged { .. })) => break,
                Ok(Some(_)) => {}
            }
        }
    }
}
