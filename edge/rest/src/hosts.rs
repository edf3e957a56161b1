//! `/v1/hosts` and `/v1/join`: the machines that run VMs, and how they come and go.

use axum::{
    Json,
    extract::{Request, State},
    response::Response,
};
use controller::SubmitOptions;
use model::{
    Actor, Command, Millis, Operation,
    name::Reference,
    query::{HostView, Listing, Query, View},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::{JoinRequest, JoinResponse, Problem, join};

use crate::{
    App, body,
    extract::{Asked, Choices, NoBody, Pages, Read, Ref},
    failure::Failure,
    inventory::unexpected,
    outcome::submit,
};

/// What is to change at a host.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostPatch {
    /// Whether new VMs may come here.
    schedulable: bool,
}

/// What a person says of a lost host.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Abandon {
    /// That its machine is off and stays off. Its VMs may be started elsewhere then: two of one VM would destroy its disk.
    machine_is_off: bool,
}

/// A join token to make.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TokenRequest {
    /// How long it is valid, seconds.
    #[schema(minimum = 1)]
    ttl_s: u32,
}

impl Default for TokenRequest {
    fn default() -> Self {
        Self { ttl_s: 3600 }
    }
}

/// A join token. It is shown this once.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct TokenText {
    /// Its text, for one host: `godwit agent --join TOKEN@ADDRESS`.
    token: String,
    /// How long it is valid, seconds.
    ttl_s: u32,
}

/// Hosts, by id.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", params(Pages),
    responses((status = 200, body = Listing<HostView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<HostView>>, Failure> {
    match app.handle.read(actor, Query::Hosts(pages.page()?)).await? {
        View::Hosts(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One host.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path, description = "name or id")),
    responses((status = 200, body = HostView), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Ref(host): Ref,
    Read(actor, _): Read,
) -> Result<Json<HostView>, Failure> {
    view(&app, actor, host).await
}

async fn view(app: &App, actor: Actor, host: Reference) -> Result<Json<HostView>, Failure> {
    match app.handle.read(actor, Query::Host(host)).await? {
        View::Host(view) => Ok(Json(*view)),
        _ => Err(unexpected()),
    }
}

/// Offers a host for new VMs, or stops doing so.
#[utoipa::path(patch, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path), Choices),
    request_body = HostPatch, responses((status = 200, body = HostView), (status = "4XX", body = Problem)))]
pub(crate) async fn change(
    State(app): State<App>,
    Ref(host): Ref,
    asked: Asked<HostPatch>,
) -> Result<Json<HostView>, Failure> {
    let command = Command::SetSchedulable {
        host: host.clone(),
        schedulable: asked.body.schedulable,
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    view(&app, asked.actor, host).await
}

/// Removes a host on which no VM is.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", params(("host" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn remove(State(app): State<App>, Ref(host): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::RemoveHost(host), asked.options).await
}

/// Removes a lost host with whatever was on it, for a person who says that its machine is off for good.
#[utoipa::path(post, path = "/v1/hosts/{host}/abandon", tag = "hosts", params(("host" = String, Path), Choices),
    request_body = Abandon, responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn abandon(
    State(app): State<App>,
    Ref(host): Ref,
    asked: Asked<Abandon>,
) -> Result<Response, Failure> {
    if !asked.body.machine_is_off {
        return Err(Failure::input(
            "machine_is_off is false: a host whose VMs may still run is not given up",
            "switch its machine off, then say that it is",
        ));
    }
    submit(&app, asked.actor, Command::AbandonHost(host), asked.options).await
}

/// Makes a one-use token with which a host joins. Each request makes another one, also with an idempotency key.
#[utoipa::path(post, path = "/v1/hosts/tokens", tag = "hosts", request_body = TokenRequest,
    responses((status = 200, body = TokenText), (status = "4XX", body = Problem)))]
pub(crate) async fn add_token(State(app): State<App>, asked: Asked<TokenRequest>) -> Result<Json<TokenText>, Failure> {
    plain(&asked.options)?;
    let ttl_s = asked.body.ttl_s;
    if ttl_s == 0 {
        return Err(Failure::input(
            "ttl_s is 0: the token would never be valid",
            "give it an hour: 3600",
        ));
    }
    let token = app
        .handle
        .add_join_token(asked.actor, Millis::seconds(u64::from(ttl_s)))
        .await?;
    Ok(Json(TokenText { token, ttl_s }))
}

/// Refuses what has no meaning for a secret that is shown once. An idempotency key has little: the secret is not stored and cannot be
/// shown again, so a repeated request gets a token of its own, and the one whose answer was lost expires unused.
fn plain(options: &SubmitOptions) -> Result<(), Failure> {
    let given = [(options.dry_run, "dry_run"), (options.expect.is_some(), "If-Match")];
    match given.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, word)) => Err(Failure::input(
            format!("a join token is made and shown at once: {word} has no meaning here"),
            "leave it out",
        )),
    }
}

/// A new host joins. Its join token, in the body, is what it may show.
#[utoipa::path(post, path = "/v1/join", tag = "hosts", request_body = JoinRequest, security(()),
    responses((status = 200, body = JoinResponse), (status = "4XX", body = Problem)))]
pub(crate) async fn join_cell(State(app): State<App>, request: Request) -> Result<Json<JoinResponse>, Failure> {
    let (parts, body) = request.into_parts();
    let bytes = body::collect(&parts.headers, body, join::BODY_BYTES_MAX).await?;
    let request: JoinRequest = body::parse_lenient(&parts.headers, &bytes)?;
    Ok(Json(app.handle.join(request).await?))
}
