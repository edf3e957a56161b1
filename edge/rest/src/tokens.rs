//! `/v1/tokens`: tokens with which programs come in.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use model::{
    Command, Millis, Name, Role, TokenId,
    query::{Listing, Query, TokenView, View},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::Problem;

use crate::{
    App,
    extract::{Asked, Choices, Id, NoBody, Pages, Read},
    failure::Failure,
    inventory::unexpected,
    outcome::submit,
};

/// A service token to make.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewToken {
    /// What people call it.
    name: Name,
    /// What it may do in the request's project: at most what the asker may, and never more than the asker still may.
    role: Role,
    /// How long it is valid, seconds; left out or null, until it is revoked.
    #[serde(default)]
    #[schema(minimum = 1)]
    ttl_s: Option<u32>,
}

/// A service token. It is shown this once.
#[derive(Deserialize, Serialize, ToSchema)]
pub(crate) struct ServiceToken {
    /// Its id.
    id: TokenId,
    /// What is presented: `Authorization: Bearer TOKEN`.
    token: String,
}

/// The project's service tokens, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens", params(Pages),
    responses((status = 200, body = Listing<TokenView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<TokenView>>, Failure> {
    match app.handle.read(actor, Query::Tokens(pages.page()?)).await? {
        View::Tokens(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// Makes a service token of the request's project.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", params(Choices), request_body = NewToken,
    responses((status = 201, body = ServiceToken), (status = 204, description = "with dry_run"), (status = "4XX", body = Problem)))]
pub(crate) async fn create(State(app): State<App>, asked: Asked<NewToken>) -> Result<Response, Failure> {
    let NewToken { name, role, ttl_s } = asked.body;
    let dry_run = asked.options.dry_run;
    let valid = ttl_s.map(|ttl_s| Millis::seconds(u64::from(ttl_s)));
    let made = app
        .handle
        .create_token(asked.actor, name, role, valid, asked.options)
        .await?;
    if dry_run {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let (id, token) = made;
    let token = token.expose().clone();
    Ok((StatusCode::CREATED, Json(ServiceToken { id, token })).into_response())
}

/// Ends a token: one's own, or a service token of the project that one administers.
#[utoipa::path(delete, path = "/v1/tokens/{token}", tag = "tokens", params(("token" = String, Path), Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn revoke(State(app): State<App>, Id(id): Id, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::RevokeToken(TokenId(id)), asked.options).await
}
