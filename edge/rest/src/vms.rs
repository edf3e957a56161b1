//! `/v1/vms`: virtual machines and what can be done with them.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use model::{
    Command, Millis, Operation, Plan,
    command::CreateVm,
    name::Reference,
    query::{Listing, Query, View, VmView},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::Problem;

use crate::{
    App,
    extract::{Asked, Choices, NoBody, Pages, Read, Ref},
    failure::Failure,
    inventory::unexpected,
    outcome::submit,
};

/// How a VM is stopped.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Stop {
    /// How long the guest may take to power off, seconds; then it is ended.
    #[schema(maximum = 3600)]
    grace_s: u32,
}

impl Default for Stop {
    fn default() -> Self {
        Self { grace_s: 30 }
    }
}

/// Where a VM is moved to.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Migrate {
    /// The host; without it one is chosen.
    to: Option<Reference>,
}

/// VMs, by id.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(Pages),
    responses((status = 200, body = Listing<VmView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<VmView>>, Failure> {
    match app.handle.read(actor, Query::Vms(pages.page()?)).await? {
        View::Vms(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One VM. Its ETag is the revision of what was asked of it.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "name or id")),
    responses((status = 200, body = VmView), (status = "4XX", body = Problem)))]
pub(crate) async fn show(State(app): State<App>, Ref(vm): Ref, Read(actor, _): Read) -> Result<Response, Failure> {
    let View::Vm(view) = app.handle.read(actor, Query::Vm(vm)).await? else {
        return Err(unexpected());
    };
    let tag = HeaderValue::try_from(format!("\"{}\"", view.revision));
    let mut response = Json(view).into_response();
    if let Ok(tag) = tag {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

/// Makes a VM and, unless asked otherwise, starts it.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", params(Choices), request_body = CreateVm,
    responses((status = 202, body = Operation), (status = 200, body = Plan, description = "with dry_run"),
        (status = "4XX", body = Problem)))]
pub(crate) async fn create(State(app): State<App>, asked: Asked<CreateVm>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::CreateVm(asked.body), asked.options).await
}

/// Ends a VM and deletes its disks.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn delete(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::DeleteVm(vm), asked.options).await
}

/// Starts a VM that is off.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn start(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::StartVm(vm), asked.options).await
}

/// Asks the guest to power off, then ends it.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", tag = "vms", params(("vm" = String, Path), Choices), request_body = Stop,
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn stop(State(app): State<App>, Ref(vm): Ref, asked: Asked<Stop>) -> Result<Response, Failure> {
    let grace = Millis::seconds(u64::from(asked.body.grace_s));
    submit(&app, asked.actor, Command::StopVm { vm, grace }, asked.options).await
}

/// Ends a VM at once.
#[utoipa::path(post, path = "/v1/vms/{vm}/kill", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn kill(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::KillVm(vm), asked.options).await
}

/// Resets a VM.
#[utoipa::path(post, path = "/v1/vms/{vm}/reboot", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn reboot(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::RebootVm(vm), asked.options).await
}

/// Makes a VM stand, held in memory.
#[utoipa::path(post, path = "/v1/vms/{vm}/pause", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn pause(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::PauseVm(vm), asked.options).await
}

/// Lets a paused VM run again.
#[utoipa::path(post, path = "/v1/vms/{vm}/resume", tag = "vms", params(("vm" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn resume(State(app): State<App>, Ref(vm): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::ResumeVm(vm), asked.options).await
}

/// Moves a VM to another host while it runs.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", tag = "vms", params(("vm" = String, Path), Choices),
    request_body = Migrate,
    responses((status = 202, body = Operation), (status = 200, body = Plan, description = "with dry_run"),
        (status = "4XX", body = Problem)))]
pub(crate) async fn migrate(State(app): State<App>, Ref(vm): Ref, asked: Asked<Migrate>) -> Result<Response, Failure> {
    let to = asked.body.to;
    submit(&app, asked.actor, Command::MigrateVm { vm, to }, asked.options).await
}

/// Opens the serial console: the connection is upgraded (HTTP/1.1) to `godwit-console`, plain bytes both ways.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vms", params(("vm" = String, Path)),
    responses((status = 101, description = "bytes follow, both ways"), (status = "4XX", body = Problem)))]
pub(crate) async fn console(
    State(app): State<App>,
    Ref(vm): Ref,
    Read(actor, _): Read,
    headers: HeaderMap,
    request: axum::extract::Request,
) -> Result<Response, Failure> {
    crate::console::open(&app, actor, vm, &headers, request).await
}
