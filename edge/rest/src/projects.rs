//! `/v1/projects`: tenants, and what their VMs may hold.

use axum::{Json, extract::State, response::Response};
use model::{
    Actor, Command, Name, Project,
    access::Quota,
    name::Reference,
    query::{Listing, Query, View},
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

/// A project to make.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewProject {
    /// Its name.
    name: Name,
    /// What its VMs may hold at most; what is left out is not bounded.
    #[serde(default)]
    quota: Quota,
}

/// Projects in which the asker has a role, by id; for a cloud admin all.
#[utoipa::path(get, path = "/v1/projects", tag = "projects", params(Pages),
    responses((status = 200, body = Listing<Project>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<Project>>, Failure> {
    match app.handle.read(actor, Query::Projects(pages.page()?)).await? {
        View::Projects(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One project, with what it may hold and holds.
#[utoipa::path(get, path = "/v1/projects/{project}", tag = "projects",
    params(("project" = String, Path, description = "name or id")),
    responses((status = 200, body = Project), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Ref(project): Ref,
    Read(actor, _): Read,
) -> Result<Json<Project>, Failure> {
    view(&app, actor, project).await
}

async fn view(app: &App, actor: Actor, project: Reference) -> Result<Json<Project>, Failure> {
    match app.handle.read(actor, Query::Project(project)).await? {
        View::Project(project) => Ok(Json(*project)),
        _ => Err(unexpected()),
    }
}

/// Makes a project.
#[utoipa::path(post, path = "/v1/projects", tag = "projects", params(Choices), request_body = NewProject,
    responses((status = 201, body = Project), (status = 204, description = "with dry_run"), (status = "4XX", body = Problem)))]
pub(crate) async fn create(State(app): State<App>, asked: Asked<NewProject>) -> Result<Response, Failure> {
    let NewProject { name, quota } = asked.body;
    let dry_run = asked.options.dry_run;
    let command = Command::CreateProject {
        name: name.clone(),
        quota,
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    created(dry_run, view(&app, asked.actor, Reference::Name(name))).await
}

/// Deletes a project in which nothing is, with its tokens and roles.
#[utoipa::path(delete, path = "/v1/projects/{project}", tag = "projects", params(("project" = String, Path), Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn delete(
    State(app): State<App>,
    Ref(project): Ref,
    asked: Asked<NoBody>,
) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::DeleteProject(project), asked.options).await
}

/// Bounds what a project's VMs may hold; what is left out is not bounded. What they hold already stays.
#[utoipa::path(put, path = "/v1/projects/{project}/quota", tag = "projects", params(("project" = String, Path), Choices),
    request_body = Quota, responses((status = 200, body = Project), (status = "4XX", body = Problem)))]
pub(crate) async fn quota(
    State(app): State<App>,
    Ref(project): Ref,
    asked: Asked<Quota>,
) -> Result<Json<Project>, Failure> {
    let command = Command::SetQuota {
        project: project.clone(),
        quota: asked.body,
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    view(&app, asked.actor, project).await
}
