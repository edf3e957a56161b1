//! `/v1/audit`: who asked for what, from where, and what came of it.

use axum::{Json, extract::State};
use model::{
    AuditEntry, Timestamp,
    audit::AuditFilter,
    name::Reference,
    query::{Listing, Page, Query, View},
};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;
use wire::Problem;

use crate::{App, extract::Read, failure::Failure, inventory::unexpected};

/// Entries of a page when the client does not say.
const PAGE_ITEMS: u32 = 100;

/// Which entries.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// At most this many.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// The `next` of the page before.
    after: Option<Uuid>,
    /// Those of this subject.
    subject: Option<String>,
    /// Those of this project, by name or id; for cloud admins, who see all without it.
    project: Option<String>,
    /// Those not before this time, milliseconds since 1970 in UTC.
    from: Option<i64>,
    /// Those before this time.
    until: Option<i64>,
}

/// The audit log, the newest first: of the request's project; for a cloud admin all of it. The newest million entries of the last
/// year are kept.
#[utoipa::path(get, path = "/v1/audit", tag = "audit", params(Which),
    responses((status = 200, body = Listing<AuditEntry>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, which): Read<Which>,
) -> Result<Json<Listing<AuditEntry>>, Failure> {
    let limit = which.limit.unwrap_or(PAGE_ITEMS) as usize;
    if !(1..=Page::LIMIT_MAX).contains(&limit) {
        let message = format!("limit is {limit}; a page has 1 to {} items", Page::LIMIT_MAX);
        return Err(Failure::input(message, "ask for less and follow `next`"));
    }
    let project = match which.project {
        None => None,
        Some(text) => {
            let wrong =
                |error: model::name::NameError| Failure::input(error.to_string(), "give a project's name or id");
            let reference: Reference = text.parse().map_err(wrong)?;
            match app.handle.read(actor.clone(), Query::Project(reference)).await? {
                View::Project(project) => Some(project.id),
                _ => return Err(unexpected()),
            }
        }
    };
    let filter = AuditFilter {
        project,
        subject: which.subject,
        from: which.from.map(Timestamp),
        until: which.until.map(Timestamp),
    };
    let page = Page {
        limit,
        after: which.after,
    };
    Ok(Json(app.handle.audit(&actor, filter, page).await?))
}
