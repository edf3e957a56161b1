//! `/v1/ports`, `/v1/security-groups`: what VMs' ports let through.

use axum::{
    Json,
    extract::{Path, State},
    response::Response,
};
use model::{
    Actor, Code, Command, Name, Refusal,
    command::PortChange,
    name::Reference,
    policy::NewRule,
    query::{Listing, PortView, Query, SecurityGroupView, View},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::Problem;

use crate::{
    App,
    extract::{Asked, Choices, NoBody, Pages, Read, Ref},
    failure::Failure,
    inventory::unexpected,
    outcome::{created, submit},
};

/// A security group to make.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewSecurityGroup {
    /// Its name.
    name: Name,
}

/// Ports of VMs, by id.
#[utoipa::path(get, path = "/v1/ports", tag = "ports", params(Pages),
    responses((status = 200, body = Listing<PortView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<PortView>>, Failure> {
    match app.handle.read(actor, Query::Ports(pages.page()?)).await? {
        View::Ports(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One port, with what went through it.
#[utoipa::path(get, path = "/v1/ports/{port}", tag = "ports",
    params(("port" = String, Path, description = "id, or name or id of a VM that has one port")),
    responses((status = 200, body = PortView), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Ref(port): Ref,
    Read(actor, _): Read,
) -> Result<Json<PortView>, Failure> {
    port_view(&app, actor, port).await
}

async fn port_view(app: &App, actor: Actor, port: Reference) -> Result<Json<PortView>, Failure> {
    match app.handle.read(actor, Query::Port(port)).await? {
        View::Port(port) => Ok(Json(*port)),
        _ => Err(unexpected()),
    }
}

/// Changes what a port lets through, at once; what is left out stays.
#[utoipa::path(patch, path = "/v1/ports/{port}", tag = "ports", params(("port" = String, Path), Choices),
    request_body = PortChange, responses((status = 200, body = PortView), (status = "4XX", body = Problem)))]
pub(crate) async fn change(
    State(app): State<App>,
    Ref(port): Ref,
    asked: Asked<PortChange>,
) -> Result<Json<PortView>, Failure> {
    let command = Command::SetPort {
        port: port.clone(),
        change: Box::new(asked.body),
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    port_view(&app, asked.actor, port).await
}

/// Security groups, by id.
#[utoipa::path(get, path = "/v1/security-groups", tag = "ports", params(Pages),
    responses((status = 200, body = Listing<SecurityGroupView>), (status = "4XX", body = Problem)))]
pub(crate) async fn groups(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<SecurityGroupView>>, Failure> {
    match app.handle.read(actor, Query::SecurityGroups(pages.page()?)).await? {
        View::SecurityGroups(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One security group, with its rules.
#[utoipa::path(get, path = "/v1/security-groups/{group}", tag = "ports",
    params(("group" = String, Path, description = "name or id")),
    responses((status = 200, body = SecurityGroupView), (status = "4XX", body = Problem)))]
pub(crate) async fn show_group(
    State(app): State<App>,
    Ref(group): Ref,
    Read(actor, _): Read,
) -> Result<Json<SecurityGroupView>, Failure> {
    group_view(&app, actor, group).await
}

async fn group_view(app: &App, actor: Actor, group: Reference) -> Result<Json<SecurityGroupView>, Failure> {
    match app.handle.read(actor, Query::SecurityGroup(group)).await? {
        View::SecurityGroup(group) => Ok(Json(*group)),
        _ => Err(unexpected()),
    }
}

/// Makes a security group, whose ports may begin what they like, and with which nobody may begin anything.
#[utoipa::path(post, path = "/v1/security-groups", tag = "ports", params(Choices), request_body = NewSecurityGroup,
    responses((status = 201, body = SecurityGroupView), (status = 204, description = "with dry_run"),
        (status = "4XX", body = Problem)))]
pub(crate) async fn create_group(State(app): State<App>, asked: Asked<NewSecurityGroup>) -> Result<Response, Failure> {
    let NewSecurityGroup { name } = asked.body;
    let dry_run = asked.options.dry_run;
    let command = Command::CreateSecurityGroup { name: name.clone() };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    created(dry_run, group_view(&app, asked.actor, Reference::Name(name))).await
}

/// Deletes a security group that nobody uses.
#[utoipa::path(delete, path = "/v1/security-groups/{group}", tag = "ports", params(("group" = String, Path), Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn delete_group(
    State(app): State<App>,
    Ref(group): Ref,
    asked: Asked<NoBody>,
) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::DeleteSecurityGroup(group), asked.options).await
}

/// Adds a rule, at once for all the group's ports.
#[utoipa::path(post, path = "/v1/security-groups/{group}/rules", tag = "ports",
    params(("group" = String, Path), Choices), request_body = NewRule,
    responses((status = 200, body = SecurityGroupView), (status = "4XX", body = Problem)))]
pub(crate) async fn add_rule(
    State(app): State<App>,
    Ref(group): Ref,
    asked: Asked<NewRule>,
) -> Result<Json<SecurityGroupView>, Failure> {
    let command = Command::AddSecurityRule {
        group: group.clone(),
        rule: asked.body,
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    group_view(&app, asked.actor, group).await
}

/// Takes a rule away, at once for all the group's ports.
#[utoipa::path(delete, path = "/v1/security-groups/{group}/rules/{number}", tag = "ports",
    params(("group" = String, Path), ("number" = u32, Path, description = "the rule's number"), Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn remove_rule(
    State(app): State<App>,
    Path((group, number)): Path<(String, String)>,
    asked: Asked<NoBody>,
) -> Result<Response, Failure> {
    let wrong = |what: &str| Refusal::new(Code::InvalidInput, format!("the path names no {what}"));
    let group: Reference = group.parse().map_err(|_| wrong("security group"))?;
    let number: u32 = number.parse().map_err(|_| wrong("rule's number"))?;
    let command = Command::RemoveSecurityRule { group, number };
    submit(&app, asked.actor, command, asked.options).await
}
