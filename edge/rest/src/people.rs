//! `/v1/login`, `/v1/logout`, `/v1/whoami`, `/v1/users`: people, their sessions, and what they may do.

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use model::{
    Actor, Code, Command, Name, Project, ProjectId, Refusal, Role, Secret, Timestamp,
    name::Reference,
    query::{Listing, Named, Query, TokenView, UserView, View},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wire::Problem;

use crate::{
    App,
    body::{self, BODY_BYTES_MAX},
    extract::{Asked, Choices, NoBody, Pages, Read, Ref, remote},
    failure::Failure,
    inventory::unexpected,
    outcome::submit,
};

/// Who wants to come in. Not shown by `Debug`.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    /// The user.
    user: Name,
    /// Its password.
    password: String,
}

/// A session that has begun.
#[derive(Deserialize, Serialize, ToSchema)]
pub(crate) struct SessionText {
    /// The token to present from now on. It is shown this once.
    token: String,
    /// When it ends by itself.
    expires_at: Timestamp,
}

/// Who asks.
#[derive(Deserialize, Serialize, ToSchema)]
pub(crate) struct WhoAmI {
    /// As operations and the audit log name it.
    subject: String,
    /// The project that the request is about.
    project: Named<ProjectId>,
    /// What it may do there.
    role: Role,
    /// The token that was shown.
    token: TokenView,
}

/// A user to make. Not shown by `Debug`.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewUser {
    /// Its name.
    name: Name,
    /// Its password, 10 characters to 256 bytes.
    password: String,
}

/// What is to change at a user.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UserPatch {
    /// Whether it may not come in. Its sessions and tokens end at once, for good.
    disabled: bool,
}

/// A new password. Not shown by `Debug`.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewPassword {
    /// The present one; cloud admins need not give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    old: Option<String>,
    /// The new one, 10 characters to 256 bytes.
    password: String,
}

/// A role to give.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Grant {
    /// In the request's project; `cloud-admin` everywhere.
    role: Role,
}

/// A role to take away.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Revoke {
    /// That of a cloud admin, instead of the one in the request's project.
    cloud_admin: bool,
}

/// Begins a session. It takes equally long and says the same whether the user or the password is wrong; more than five attempts a
/// minute are refused (429).
#[utoipa::path(post, path = "/v1/login", tag = "people", request_body = Login, security(()),
    responses((status = 200, body = SessionText), (status = "4XX", body = Problem)))]
pub(crate) async fn login(State(app): State<App>, request: Request) -> Result<Json<SessionText>, Failure> {
    let (parts, body) = request.into_parts();
    let from = remote(&parts);
    let bytes = body::collect(&parts.headers, body, BODY_BYTES_MAX).await?;
    let Login { user, password } = body::parse(&parts.headers, &bytes)?;
    let session = app.handle.login(&user, Secret::new(password), from).await?;
    Ok(Json(SessionText {
        token: session.token.expose().clone(),
        expires_at: session.expires_at,
    }))
}

/// Ends the token that the request shows.
#[utoipa::path(post, path = "/v1/logout", tag = "people", params(Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn logout(State(app): State<App>, asked: Asked<NoBody>) -> Result<Response, Failure> {
    let Some(token) = asked.actor.via.token else {
        return Err(Refusal::new(Code::Unauthenticated, "no token was shown").into());
    };
    submit(&app, asked.actor, Command::RevokeToken(token), asked.options).await
}

/// Who asks, about which project, and with what right.
#[utoipa::path(get, path = "/v1/whoami", tag = "people",
    responses((status = 200, body = WhoAmI), (status = "4XX", body = Problem)))]
pub(crate) async fn whoami(State(app): State<App>, Read(actor, _): Read) -> Result<Json<WhoAmI>, Failure> {
    let Project { id, name, .. } = match app
        .handle
        .read(actor.clone(), Query::Project(Reference::Id(actor.project.0)))
        .await?
    {
        View::Project(project) => *project,
        _ => return Err(unexpected()),
    };
    let View::Token(token) = app.handle.read(actor.clone(), Query::OwnToken).await? else {
        return Err(unexpected());
    };
    Ok(Json(WhoAmI {
        subject: actor.subject,
        project: Named { id, name },
        role: actor.role,
        token: *token,
    }))
}

/// Users with a role in the project, by id; for a cloud admin all.
#[utoipa::path(get, path = "/v1/users", tag = "people", params(Pages),
    responses((status = 200, body = Listing<UserView>), (status = "4XX", body = Problem)))]
pub(crate) async fn list(
    State(app): State<App>,
    Read(actor, pages): Read<Pages>,
) -> Result<Json<Listing<UserView>>, Failure> {
    match app.handle.read(actor, Query::Users(pages.page()?)).await? {
        View::Users(listing) => Ok(Json(listing)),
        _ => Err(unexpected()),
    }
}

/// One user.
#[utoipa::path(get, path = "/v1/users/{user}", tag = "people", params(("user" = String, Path, description = "name or id")),
    responses((status = 200, body = UserView), (status = "4XX", body = Problem)))]
pub(crate) async fn show(
    State(app): State<App>,
    Ref(user): Ref,
    Read(actor, _): Read,
) -> Result<Json<UserView>, Failure> {
    view(&app, actor, user).await
}

async fn view(app: &App, actor: Actor, user: Reference) -> Result<Json<UserView>, Failure> {
    match app.handle.read(actor, Query::User(user)).await? {
        View::User(view) => Ok(Json(*view)),
        _ => Err(unexpected()),
    }
}

/// Makes a user, who may do nothing yet.
#[utoipa::path(post, path = "/v1/users", tag = "people", params(Choices), request_body = NewUser,
    responses((status = 201, body = UserView), (status = 204, description = "with dry_run"), (status = "4XX", body = Problem)))]
pub(crate) async fn create(State(app): State<App>, asked: Asked<NewUser>) -> Result<Response, Failure> {
    let NewUser { name, password } = asked.body;
    let dry_run = asked.options.dry_run;
    app.handle
        .create_user(asked.actor.clone(), name.clone(), Secret::new(password), asked.options)
        .await?;
    crate::outcome::created(dry_run, view(&app, asked.actor, Reference::Name(name))).await
}

/// Keeps a user out, or lets it in again.
#[utoipa::path(patch, path = "/v1/users/{user}", tag = "people", params(("user" = String, Path), Choices),
    request_body = UserPatch, responses((status = 200, body = UserView), (status = "4XX", body = Problem)))]
pub(crate) async fn change(
    State(app): State<App>,
    Ref(user): Ref,
    asked: Asked<UserPatch>,
) -> Result<Json<UserView>, Failure> {
    let command = Command::SetUserDisabled {
        user: user.clone(),
        disabled: asked.body.disabled,
    };
    app.handle.submit(asked.actor.clone(), command, asked.options).await?;
    view(&app, asked.actor, user).await
}

/// Deletes a user with its sessions and tokens.
#[utoipa::path(delete, path = "/v1/users/{user}", tag = "people", params(("user" = String, Path), Choices),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn delete(State(app): State<App>, Ref(user): Ref, asked: Asked<NoBody>) -> Result<Response, Failure> {
    submit(&app, asked.actor, Command::DeleteUser(user), asked.options).await
}

/// Changes a password, one's own or, as a cloud admin, another's. The user's other sessions end.
#[utoipa::path(post, path = "/v1/users/{user}/password", tag = "people", params(("user" = String, Path), Choices),
    request_body = NewPassword, responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn password(
    State(app): State<App>,
    Ref(user): Ref,
    asked: Asked<NewPassword>,
) -> Result<StatusCode, Failure> {
    let NewPassword { old, password } = asked.body;
    let (old, new) = (old.map(Secret::new), Secret::new(password));
    app.handle
        .set_password(asked.actor, user, old, new, asked.options)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a user a role in the request's project, in place of the one that it has there; or that of a cloud admin.
#[utoipa::path(post, path = "/v1/users/{user}/grant", tag = "people", params(("user" = String, Path), Choices),
    request_body = Grant, responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn grant(State(app): State<App>, Ref(user): Ref, asked: Asked<Grant>) -> Result<Response, Failure> {
    let role = asked.body.role;
    submit(&app, asked.actor, Command::Grant { user, role }, asked.options).await
}

/// Takes a user's role in the request's project away, or that of a cloud admin.
#[utoipa::path(post, path = "/v1/users/{user}/revoke", tag = "people", params(("user" = String, Path), Choices),
    request_body = Revoke, responses((status = 204), (status = "4XX", body = Problem)))]
pub(crate) async fn revoke(State(app): State<App>, Ref(user): Ref, asked: Asked<Revoke>) -> Result<Response, Failure> {
    let Revoke { cloud_admin } = asked.body;
    submit(&app, asked.actor, Command::Revoke { user, cloud_admin }, asked.options).await
}
