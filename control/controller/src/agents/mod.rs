//! The agents' port: sessions, blobs, consoles, renewals. Who a client is stands in its certificate, never in what it says.

mod session;

use std::{
    io::{self, Seek as _, SeekFrom},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    Json, Router,
    body::{Body, BodyDataStream},
    extract::{DefaultBodyLimit, Extension, Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use model::{Digest, HostId, Refusal, refusal::Code, template::Blob};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf, WriteHalf},
    sync::mpsc,
};
use uuid::Uuid;
use wire::{Problem, RenewRequest, RenewResponse, join::BODY_BYTES_MAX, session as paths};

use crate::{
    blobs::Blobs,
    clock::Clock,
    committed::Committed,
    consoles::{AgentsEnd, Consoles, Place},
    core::Input,
    handle::Shared,
    joining::Authority,
    meters::Meters,
    telemetry,
};

/// Bytes of a piece of a blob or console.
const PIECE_BYTES: usize = 64 << 10;

/// What the agents' port needs.
#[derive(Clone)]
pub(crate) struct Agents {
    pub(crate) inputs: mpsc::Sender<Input>,
    pub(crate) committed: Arc<Committed>,
    pub(crate) blobs: Blobs,
    pub(crate) consoles: Arc<Consoles>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) telemetry: Arc<telemetry::Store>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) meters: Arc<Meters>,
}

impl Agents {
    pub(crate) fn of(shared: &Shared) -> Self {
        Self {
            inputs: shared.inputs.clone(),
            committed: shared.committed.clone(),
            blobs: shared.blobs.clone(),
            consoles: shared.consoles.clone(),
            authority: shared.authority.clone(),
            telemetry: shared.telemetry.clone(),
            clock: shared.clock.clone(),
            meters: shared.meters.clone(),
        }
    }
}

pub(crate) fn router(agents: Agents) -> Router {
    Router::new()
        .route(paths::SESSION_PATH, post(session::open))
        .route(
            &format!("{}/{{digest}}", paths::BLOBS_PATH),
            get(blob).put(take_blob).layer(DefaultBodyLimit::disable()),
        )
        .route(&format!("{}/{{console}}", paths::CONSOLE_PATH), post(console))
        .route(
            paths::RENEW_PATH,
            post(renew).layer(DefaultBodyLimit::max(BODY_BYTES_MAX)),
        )
        .with_state(agents)
}

/// A refusal as the answer to an HTTP request.
pub(crate) struct Refused(pub(crate) Refusal);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let problem = Problem::of(&self.0, None);
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = [(header::CONTENT_TYPE, wire::problem::MEDIA_TYPE)];
        (status, kind, Json(problem)).into_response()
    }
}

fn not_found(what: &str) -> Refused {
    Refused(Refusal::new(Code::NotFound, what))
}

/// A removed host still has a valid certificate; it is told so.
fn known(agents: &Agents, host: HostId) -> Result<(), Refused> {
    if agents.committed.knows_host(host) {
        return Ok(());
    }
    let message = format!("host {host} is not, or no longer, of this cell");
    Err(Refused(
        Refusal::new(Code::Forbidden, message).hint("join it anew: `godwit host add-token`"),
    ))
}

/// A blob, or what follows its first bytes: `Range: bytes=N-`, after a connection that was cut.
async fn blob(
    State(agents): State<Agents>,
    Extension(host): Extension<HostId>,
    Path(digest): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    known(&agents, host)?;
    let digest: Digest = digest.parse().map_err(|_| not_found("no such blob"))?;
    if !agents.committed.names_blob(digest) {
        return Err(not_found("no template has this blob"));
    }
    let blobs = agents.blobs.clone();
    let from = first_byte(&headers)?;
    let opened = tokio::task::spawn_blocking(move || {
        let (mut file, size_bytes) = blobs.open_blob(digest)?;
        file.seek(SeekFrom::Start(from.min(size_bytes)))?;
        Ok::<_, io::Error>((file, size_bytes))
    });
    let opened = opened.await;
    let (file, size_bytes) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_found("the controller no longer has this blob"));
        }
        Ok(Err(error)) => {
            return Err(Refused(Refusal::new(
                Code::Other,
                format!("the blob cannot be read: {error}"),
            )));
        }
        Err(error) => return Err(Refused(Refusal::new(Code::Other, error.to_string()))),
    };
    let body = Body::from_stream(pieces(tokio::fs::File::from_std(file)));
    let left = [(header::CONTENT_LENGTH, size_bytes.saturating_sub(from).to_string())];
    if from == 0 {
        return Ok((left, body).into_response());
    }
    if from >= size_bytes {
        let message = format!("the blob has {size_bytes} bytes, there are none from {from} on");
        return Err(Refused(Refusal::new(Code::InvalidInput, message)));
    }
    let range = format!("bytes {from}-{}/{size_bytes}", size_bytes - 1);
    Ok((
        StatusCode::PARTIAL_CONTENT,
        left,
        [(header::CONTENT_RANGE, range)],
        body,
    )
        .into_response())
}

/// Where the bytes that are asked for begin: 0 without a range.
fn first_byte(headers: &HeaderMap) -> Result<u64, Refused> {
    let Some(range) = headers.get(header::RANGE) else {
        return Ok(0);
    };
    let first = range.to_str().ok().and_then(|range| range.strip_prefix("bytes="));
    let first = first
        .and_then(|range| range.strip_suffix('-'))
        .and_then(|first| first.parse().ok());
    first.ok_or_else(|| {
        Refused(Refusal::new(
            Code::InvalidInput,
            "the range is not of the form bytes=N-",
        ))
    })
}

/// What the disk of a template became on the host that imports it: kept for hosts that fetch it while that one is away.
async fn take_blob(
    State(agents): State<Agents>,
    Extension(host): Extension<HostId>,
    Path(digest): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Refused> {
    known(&agents, host)?;
    if !agents.committed.imports(host) {
        let message = format!("host {host} imports no template");
        return Err(Refused(Refusal::new(Code::Forbidden, message)));
    }
    let digest: Digest = digest.parse().map_err(|_| not_found("no such blob"))?;
    let size = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|size| size.to_str().ok()?.parse().ok());
    let size_bytes =
        size.ok_or_else(|| Refused(Refusal::new(Code::InvalidInput, "the blob's length is not announced")))?;
    let pieces = body.into_data_stream();
    agents
        .blobs
        .put(Blob { digest, size_bytes }, pieces)
        .await
        .map_err(Refused)?;
    Ok(StatusCode::NO_CONTENT)
}

/// What can be read, piece by piece, as it is asked for.
fn pieces<R>(reader: R) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    R: AsyncRead + Unpin + Send + 'static,
{
    stream::try_unfold(reader, |mut reader| async move {
        let mut piece = bytes::BytesMut::with_capacity(PIECE_BYTES);
        let count = reader.read_buf(&mut piece).await?;
        Ok((count > 0).then(|| (piece.freeze(), reader)))
    })
}

async fn console(
    State(agents): State<Agents>,
    Extension(host): Extension<HostId>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refused> {
    known(&agents, host)?;
    let ticket = headers
        .get(paths::TICKET_HEADER)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let opened = agents.consoles.open(id, host, ticket, Instant::now());
    let Some(AgentsEnd { pipe, place }) = opened else {
        let message = "no console waits for this ticket: it is wrong, used or older than 30 s";
        return Err(Refused(Refusal::new(Code::Forbidden, message)));
    };
    let (typed, printed): (ReadHalf<DuplexStream>, WriteHalf<DuplexStream>) = tokio::io::split(pipe);
    let place = Arc::new(place);
    tokio::spawn(print(body.into_data_stream(), printed, place.clone()));
    let typed = pieces(Keeping {
        reader: typed,
        _with: place,
    });
    Ok(Body::from_stream(typed).into_response())
}

/// A reader, and what is kept as long as it is read.
struct Keeping<R, T> {
    reader: R,
    _with: T,
}

impl<R: AsyncRead + Unpin, T: Unpin> AsyncRead for Keeping<R, T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, to)
    }
}

/// What the guest prints, to the person; until either goes.
async fn print(mut body: BodyDataStream, mut printed: WriteHalf<DuplexStream>, _place: Arc<Place>) {
    while let Some(Ok(piece)) = body.next().await {
        if printed.write_all(&piece).await.is_err() {
            return;
        }
    }
    // The person sees the end.
    let _ = printed.shutdown().await;
}

async fn renew(
    State(agents): State<Agents>,
    Extension(host): Extension<HostId>,
    body: Bytes,
) -> Result<Json<RenewResponse>, Refused> {
    known(&agents, host)?;
    // Whatever the type it is sent as: only agents come here.
    let request: RenewRequest = serde_json::from_slice(&body)
        .map_err(|error| Refused(Refusal::new(Code::InvalidInput, format!("no renewal: {error}"))))?;
    let certificate_pem = agents.authority.certify(&request.csr_pem, host).map_err(Refused)?;
    Ok(Json(RenewResponse { certificate_pem }))
}
