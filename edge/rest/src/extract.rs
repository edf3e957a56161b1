//! What a request says, read from its parts: who asks, about what, how, and with which body.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, header, request::Parts},
};
use controller::SubmitOptions;
use model::{Actor, Code, Refusal, Revision, command::IdempotencyKey, name::Reference, query::Page};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    App, PROJECT_HEADER,
    body::{self, BODY_BYTES_MAX},
    failure::Failure,
};

/// Items of a page when the client does not say.
const PAGE_ITEMS: u32 = 100;

/// Longest idempotency key.
const KEY_MAX: usize = 255;

/// Who asks, by the bearer token; and the query, in which nothing unknown may stand.
pub(crate) struct Read<Q = NoQuery>(pub(crate) Actor, pub(crate) Q);

/// A request that changes something: who asks, how, and the body.
pub(crate) struct Asked<T> {
    pub(crate) actor: Actor,
    pub(crate) options: SubmitOptions,
    pub(crate) body: T,
}

/// The name or id in the path.
pub(crate) struct Ref(pub(crate) Reference);

/// An id in the path.
pub(crate) struct Id(pub(crate) Uuid);

/// No parameter.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoQuery {}

/// No field.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoBody {}

/// How a change is asked for.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Choices {
    /// Say what would be done, and do nothing.
    #[serde(default)]
    #[param(default = false)]
    dry_run: bool,
}

/// Which part of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Pages {
    /// At most this many items.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// The `next` of the page before.
    after: Option<Uuid>,
}

impl Pages {
    /// For queries that say more than this.
    pub(crate) const fn of(limit: Option<u32>, after: Option<Uuid>) -> Self {
        Self { limit, after }
    }

    pub(crate) fn page(&self) -> Result<Page, Failure> {
        let limit = self.limit.unwrap_or(PAGE_ITEMS) as usize;
        if !(1..=Page::LIMIT_MAX).contains(&limit) {
            let message = format!("limit is {limit}; a page has 1 to {} items", Page::LIMIT_MAX);
            return Err(Failure::input(message, "ask for less and follow `next`"));
        }
        Ok(Page {
            limit,
            after: self.after,
        })
    }
}

impl<Q: DeserializeOwned + Send> FromRequestParts<App> for Read<Q> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let actor = authenticate(app, parts)?;
        Ok(Self(actor, query(parts)?))
    }
}

impl<T: DeserializeOwned + Serialize> FromRequest<App> for Asked<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let actor = authenticate(app, &parts)?;
        let choices: Choices = query(&parts)?;
        let expect = if_match(&parts.headers)?;
        let name = idempotency_key(&parts.headers)?;
        let bytes = body::collect(&parts.headers, body, BODY_BYTES_MAX).await?;
        let key = name.map(|key| {
            let asked = [parts.method.as_str().as_bytes(), parts.uri.path().as_bytes(), &bytes];
            // Lengths keep the three apart.
            let hash = asked.iter().fold(Sha256::new(), |hash, part| {
                hash.chain_update((part.len() as u64).to_be_bytes()).chain_update(part)
            });
            let body_hash = hash.finalize().into();
            IdempotencyKey { key, body_hash }
        });
        let body = body::parse(&parts.headers, &bytes)?;
        let options = SubmitOptions {
            key,
            expect,
            dry_run: choices.dry_run,
        };
        Ok(Self { actor, options, body })
    }
}

impl FromRequestParts<App> for Ref {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let text = last(parts, app).await?;
        let wrong =
            |error: model::name::NameError| Failure::input(error.to_string(), "give the name or the id of a thing");
        text.parse().map(Self).map_err(wrong)
    }
}

impl FromRequestParts<App> for Id {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let text = last(parts, app).await?;
        let wrong = |_| {
            Failure::input(
                "the id in the path is not a UUID",
                "take it from the list of operations",
            )
        };
        Uuid::try_parse(&text).map(Self).map_err(wrong)
    }
}

/// The path's one parameter, decoded.
pub(crate) async fn last(parts: &mut Parts, app: &App) -> Result<String, Failure> {
    let path = <Path<String> as FromRequestParts<App>>::from_request_parts(parts, app).await;
    let Path(text) = path.map_err(|_| Failure::input("the path is not UTF-8", "encode it as UTF-8"))?;
    Ok(text)
}

/// Whom the request's token speaks for, in the project that the request names.
pub(crate) fn authenticate(app: &App, parts: &Parts) -> Result<Actor, Failure> {
    let mut given = parts.headers.get_all(header::AUTHORIZATION).iter();
    let refuse = |message: &str| {
        Refusal::new(Code::Unauthenticated, message)
            .hint("send `Authorization: Bearer TOKEN`; the first token is in admin.token")
    };
    let (Some(one), None) = (given.next(), given.next()) else {
        return Err(refuse("the request has no token, or more than one").into());
    };
    let scheme_and_token = one.to_str().ok().and_then(|text| text.split_once(' '));
    let token = scheme_and_token
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let token = token.ok_or_else(|| refuse("the Authorization header is not of the form `Bearer TOKEN`"))?;
    // Who shows no valid token learns nothing of the rest of the request either.
    let actor = app.handle.authenticate_in(token, None, remote(parts));
    match (project(&parts.headers), actor) {
        (Ok(None), actor) => Ok(actor?),
        (_, Err(refusal)) if refusal.code == Code::Unauthenticated => Err(refusal.into()),
        (project, _) => Ok(app.handle.authenticate_in(token, project?.as_ref(), remote(parts))?),
    }
}

/// Where the request came from.
pub(crate) fn remote(parts: &Parts) -> Option<IpAddr> {
    let connection = parts.extensions.get::<ConnectInfo<SocketAddr>>();
    connection.map(|ConnectInfo(from)| from.ip().to_canonical())
}

/// The project that the request is about, where it says one.
fn project(headers: &HeaderMap) -> Result<Option<Reference>, Failure> {
    let mut given = headers.get_all(PROJECT_HEADER).iter();
    let Some(one) = given.next() else { return Ok(None) };
    let reference = one.to_str().ok().and_then(|text| text.trim().parse().ok());
    match (reference, given.next()) {
        (Some(reference), None) => Ok(Some(reference)),
        _ => Err(Failure::input(
            "the request does not name exactly one project",
            "send the name or the id of one in Godwit-Project",
        )),
    }
}

pub(crate) fn query<Q: DeserializeOwned>(parts: &Parts) -> Result<Q, Failure> {
    let read = Query::<Q>::try_from_uri(&parts.uri).map(|Query(query)| query);
    read.map_err(|error| {
        let why = error.body_text();
        let why = why.strip_prefix("Failed to deserialize query string: ").unwrap_or(&why);
        let why: String = why.chars().take(300).collect();
        Failure::input(
            format!("the query is refused: {why}"),
            "/v1/openapi.json has the parameters of each path",
        )
    })
}

/// The revision that the thing is to have (RFC 9110, 13.1.1): one strong entity tag of ours.
fn if_match(headers: &HeaderMap) -> Result<Option<Revision>, Failure> {
    let mut given = headers.get_all(header::IF_MATCH).iter();
    let Some(one) = given.next() else { return Ok(None) };
    let text = one.to_str().unwrap_or_default().trim();
    let number = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .and_then(|text| text.parse().ok());
    match (text, number, given.next()) {
        ("*", _, None) => Ok(None),
        (_, Some(revision), None) => Ok(Some(Revision(revision))),
        _ => Err(Failure::input(
            "If-Match is not an entity tag of this server",
            "send the ETag of the answer that you read, as it was",
        )),
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut given = headers.get_all("idempotency-key").iter();
    let Some(one) = given.next() else { return Ok(None) };
    let text = one
        .to_str()
        .ok()
        .filter(|text| (1..=KEY_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()));
    match (text, given.next()) {
        (Some(text), None) => Ok(Some(text.to_owned())),
        _ => Err(Failure::input(
            "the idempotency key is not 1 to 255 visible ASCII characters",
            "send a random UUID",
        )),
    }
}
