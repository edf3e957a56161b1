//! `/v1/blobs`: the bytes that templates are made of, uploaded under their digest before the template names them.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header, request::Parts},
};
use controller::BLOB_BYTES_MAX;
use model::{Code, Digest, Refusal};
use serde::Deserialize;
use utoipa::IntoParams;
use wire::Problem;

use crate::{
    App,
    extract::{NoQuery, Read, authenticate, last, query},
    failure::Failure,
};

/// Which blob exactly.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Size {
    /// Its size, bytes.
    size_bytes: u64,
}

/// The digest in the path.
pub(crate) struct InPath(Digest);

impl axum::extract::FromRequestParts<App> for InPath {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let text = last(parts, app).await?;
        let wrong = |error: model::storage::DigestError| Failure::input(error.to_string(), "sha256sum prints it");
        text.parse().map(Self).map_err(wrong)
    }
}

/// Uploads a blob. It is there only when all its bytes are and have this digest.
#[utoipa::path(put, path = "/v1/blobs/{sha256}", tag = "blobs", params(("sha256" = String, Path)),
    request_body(content_type = "application/octet-stream"),
    responses((status = 204, description = "it is there"), (status = "4XX", body = Problem)))]
pub(crate) async fn put(
    State(app): State<App>,
    InPath(digest): InPath,
    request: Request,
) -> Result<StatusCode, Failure> {
    let (parts, body) = request.into_parts();
    let actor = authenticate(&app, &parts)?;
    let NoQuery {} = query(&parts)?;
    let size_bytes = length(&parts.headers)?;
    app.handle
        .put_blob(&actor, digest, size_bytes, body.into_data_stream())
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether a blob is there, so that it need not be uploaded.
#[utoipa::path(head, path = "/v1/blobs/{sha256}", tag = "blobs", params(("sha256" = String, Path), Size),
    responses((status = 204, description = "it is there"), (status = 404, description = "it is not")))]
pub(crate) async fn head(
    State(app): State<App>,
    InPath(digest): InPath,
    Read(_asker, size): Read<Size>,
) -> Result<StatusCode, Failure> {
    if app.handle.has_blob(digest, size.size_bytes) {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(
        Refusal::new(Code::NotFound, "there is no blob with this digest and size")
            .hint("upload it")
            .into(),
    )
}

fn length(headers: &HeaderMap) -> Result<u64, Failure> {
    let given = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let Some(size_bytes) = given else {
        let refusal =
            Refusal::new(Code::InvalidInput, "the blob's length is not announced").hint("send Content-Length");
        return Err(Failure::with_status(StatusCode::LENGTH_REQUIRED, &refusal));
    };
    if size_bytes > BLOB_BYTES_MAX {
        let refusal = Refusal::new(
            Code::InvalidInput,
            format!("a blob has at most {BLOB_BYTES_MAX} bytes, not {size_bytes}"),
        )
        .hint("make the image smaller");
        return Err(Failure::with_status(StatusCode::PAYLOAD_TOO_LARGE, &refusal));
    }
    Ok(size_bytes)
}
