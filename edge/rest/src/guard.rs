//! What holds for every request: it was meant for this server, no foreign page made it, and each answer says who gave it.

mod unread;

use std::net::IpAddr;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use model::{Code, Refusal};

use crate::{App, VERSION_HEADER, failure::Failure};

/// Passes a request on if it was meant for this server.
pub(crate) async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let mut response = unread::answered(request, async |request: Request| {
        match meant_for_us(&app, request.uri(), request.headers()) {
            Ok(()) => next.run(request).await,
            Err(failure) => failure.into_response(),
        }
    })
    .await;
    let headers = response.headers_mut();
    headers.insert(VERSION_HEADER, HeaderValue::from_static(env!("CARGO_PKG_VERSION")));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

fn meant_for_us(app: &App, uri: &Uri, headers: &HeaderMap) -> Result<(), Failure> {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // Beside a Content-Length two readers on the way could find the next request in different places (RFC 9112, 6.3), and
        // hyper has taken that header away by now: chunks are refused altogether.
        let refusal = Refusal::new(
            Code::InvalidInput,
            "the request's length is not announced by Content-Length alone",
        )
        .hint("send Content-Length, and no Transfer-Encoding");
        return Err(Failure::with_status(StatusCode::LENGTH_REQUIRED, &refusal));
    }
    let authority = authority(uri, headers)?;
    let host = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_ascii_lowercase();
    let known = host == "localhost" || host.parse::<IpAddr>().is_ok() || app.names.contains(&host);
    if !known {
        let refusal = Refusal::new(Code::InvalidInput, "this server is not the host that the request names")
            .hint("use one of the names that the controller was given with --name, or its address");
        return Err(Failure::with_status(StatusCode::MISDIRECTED_REQUEST, &refusal));
    }
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let own = format!("https://{authority}");
    if origin.as_bytes().eq_ignore_ascii_case(own.as_bytes()) {
        return Ok(());
    }
    let refusal = Refusal::new(Code::Forbidden, "the request was made by a page of another origin")
        .hint("use the command line, or a page that this server served");
    Err(refusal.into())
}

/// The one host that the request names. HTTP/2 has it in the URI, HTTP/1.1 in a header, and neither may contradict itself.
fn authority(uri: &Uri, headers: &HeaderMap) -> Result<Authority, Failure> {
    let mut named = headers.get_all(header::HOST).iter();
    let (first, second) = (named.next(), named.next());
    let wrong = || Failure::input("the request does not name exactly one host", "send one Host header");
    let read = |value: &HeaderValue| value.to_str().ok().and_then(|text| text.parse::<Authority>().ok());
    let header = match first {
        Some(value) => Some(read(value).ok_or_else(wrong)?),
        None => None,
    };
    match (uri.authority().cloned(), header) {
        _ if second.is_some() => Err(wrong()),
        (Some(one), Some(other)) if one != other => Err(wrong()),
        (Some(one), _) | (None, Some(one)) if !one.as_str().contains('@') => Ok(one),
        _ => Err(wrong()),
    }
}

/// No endpoint has this path.
pub(crate) async fn unknown_path() -> Failure {
    Refusal::new(Code::NotFound, "no endpoint has this path")
        .hint("/v1/openapi.json lists them all")
        .into()
}

/// An endpoint has this path, but not with this method.
pub(crate) async fn unknown_method(method: Method) -> Failure {
    let refusal = Refusal::new(Code::InvalidInput, format!("this path does not take {method}"))
        .hint("the Allow header has the methods that it takes");
    Failure::with_status(StatusCode::METHOD_NOT_ALLOWED, &refusal)
}
