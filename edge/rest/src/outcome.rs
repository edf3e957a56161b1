//! What a request led to, as an HTTP answer.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use controller::SubmitOptions;
use model::{Actor, Command, Outcome};
use serde::Serialize;

use crate::{App, failure::Failure};

/// Asks the controller and translates its answer: 202 with the operation for work that goes on, 200 for what is done or planned.
pub(crate) async fn submit(
    app: &App,
    actor: Actor,
    command: Command,
    options: SubmitOptions,
) -> Result<Response, Failure> {
    match app.handle.submit(actor, command, options).await? {
        Outcome::Operation(operation) => {
            let status = if operation.state.is_over() {
                StatusCode::OK
            } else {
                StatusCode::ACCEPTED
            };
            let location = format!("/v1/operations/{}", operation.id);
            let mut response = (status, Json(operation)).into_response();
            if let Ok(location) = HeaderValue::try_from(location) {
                response.headers_mut().insert(header::LOCATION, location);
            }
            Ok(response)
        }
        Outcome::Plan(plan) => Ok(Json(plan).into_response()),
        Outcome::Done => Ok(StatusCode::NO_CONTENT.into_response()),
    }
}

/// 201 with what was made, as it can be read now; 204 when it was only tried.
pub(crate) async fn created<T: Serialize>(
    dry_run: bool,
    view: impl Future<Output = Result<Json<T>, Failure>>,
) -> Result<Response, Failure> {
    if dry_run {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let made = view.await?;
    Ok((StatusCode::CREATED, made).into_response())
}
