//! `/v1/templates`: what VMs are made from.

use axum::{Json, extract::State, response::Response};
use model::{
    Command, Name, Operation, Template,
    query::{Listing, Query, View},
    template::Content,
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

/// A template to make of blobs that were uploaded before.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateTemplate {
    /// Its name.
    name: Name,
    /// What it holds.
    content: Content,
}

/// Templates, by id.
#[utoipa::path(get, path = "/v1/templates", tag = "templates", params(Pages),
    responses((status = 200, body = Listing<Template>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<Template>>, Failure> {
    match app.handle.read(actor, Query::Templates(pages.page()?)).await? {
        View::Templates(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One template.
#[utoipa::path(get, path = "/v1/templates/{template}", tag = "templates",
    params(("template" = String, Path, description = "name or id")),
    responses((status = 200, body = Template), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Ref(template): Ref,
    Read(actor, _): Read,
) -> Result<Json<Template>, Failure> {
    match app.handle.read(actor, Query::Template(template)).await? {
        View::Template(template) => Ok(Json(*template)),
        _ => Err(unexpected()),
    }
}

/// Makes a template: a host fetches its blobs into a pool and vets them.
#[utoipa::path(post, path = "/v1/templates", tag = "templates", params(Choices), request_body = CreateTemplate,
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn create(State(app): State<App>, asked: Asked<CreateTemplate>) -> Result<Response, Failure> {
    let CreateTemplate { name, content } = asked.body;
    submit(
        &app,
        asked.actor,
        Command::CreateTemplate { name, content },
        asked.options,
    )
    .await
}

/// Deletes a template that no VM is made from.
#[utoipa::path(delete, path = "/v1/templates/{template}", tag = "templates", params(("template" = String, Path), Choices),
    responses((status = 202, body = Operation), (status = "4XX", body = Problem)))]
pub(crate) async fn delete(
    State(app): State<App>,
    Ref(template): Ref,
    asked: Asked<NoBody>,
) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::DeleteTemplate(template), asked.options).await
}
