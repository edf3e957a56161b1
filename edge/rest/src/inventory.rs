//! `/v1/networks`, `/v1/pools`, `/v1/volumes`: what VMs are attached to and stored on.

use axum::{Json, extract::State};
use model::{
    Code, Pool, Refusal, Volume,
    query::{Listing, NetworkView, Query, View},
};
use wire::Problem;

use crate::{
    App,
    extract::{Pages, Read},
    failure::Failure,
};

/// The controller answered another question. It never does.
pub(crate) fn unexpected() -> Failure {
    Refusal::new(Code::Other, "the controller answered another question than was asked")
        .hint("report this as a bug")
        .into()
}

/// Networks, by id.
#[utoipa::path(get, path = "/v1/networks", tag = "inventory", params(Pages),
    responses((status = 200, body = Listing<NetworkView>), (status = "4XX", body = Problem)))]
pub(crate) async fn networks(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<NetworkView>>, Failure> {
    match app.handle.read(actor, Query::Networks(pages.page()?)).await? {
        View::Networks(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// Pools, by id.
#[utoipa::path(get, path = "/v1/pools", tag = "inventory", params(Pages),
    responses((status = 200, body = Listing<Pool>), (status = "4XX", body = Problem)))]
pub(crate) async fn pools(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<Pool>>, Failure> {
    match app.handle.read(actor, Query::Pools(pages.page()?)).await? {
        View::Pools(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// Volumes, by id.
#[utoipa::path(get, path = "/v1/volumes", tag = "inventory", params(Pages),
    responses((status = 200, body = Listing<Volume>), (status = "4XX", body = Problem)))]
pub(crate) async fn volumes(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<Volume>>, Failure> {
    match app.handle.read(actor, Query::Volumes(pages.page()?)).await? {
        View::Volumes(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}
