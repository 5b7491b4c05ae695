//! A repository in a bucket of any S3-compatible server that honours `If-None-Match: *`.
//!
//! Invariants: every request has a bounded time and a bounded number of attempts; an object is created by one
//! conditional put, never by parts; an answer is not read beyond the caller's bound. A put whose answer was lost may be
//! reported as "exists": callers look at whose the object is. Credentials come from the named profile, else from the
//! environment, else from the default profile.

use crate::error::{RepoError, RepoErrorKind};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use ogee_common::limits::{RETRY_BACKOFF_MAX, S3_ATTEMPT_TIMEOUT, S3_ATTEMPTS, S3_CALL_TIMEOUT};
use ogee_common::rng;
use std::env;
use std::error::Error;
use std::path::PathBuf;

/// Where a bucket is and how to speak to its server.
#[derive(Debug, Clone, Default)]
pub struct S3Options {
    /// The bucket.
    pub bucket: String,
    /// Keys start with this; empty, or without a slash at its end.
    pub prefix: String,
    /// `http://host:port`; `None` is Amazon's of the region.
    pub endpoint: Option<String>,
    /// The region; `None` is `AWS_REGION` or `us-east-1`.
    pub region: Option<String>,
    /// Put the bucket into the host name; most servers but Amazon's want it in the path.
    pub virtual_hosts: bool,
    /// Certificates (PEM) to believe instead of the system's.
    pub ca: Option<PathBuf>,
    /// Credentials file; `None` is `AWS_SHARED_CREDENTIALS_FILE` or `~/.aws/credentials`.
    pub credentials: Option<PathBuf>,
    /// Profile in it; `None` is the environment's keys, `AWS_PROFILE` or `default`.
    pub profile: Option<String>,
}

/// A bucket.
#[derive(Debug, Clone)]
pub(crate) struct S3Backend {
    client: Client,
    bucket: String,
    prefix: String,
}

impl S3Backend {
    pub(crate) fn new(options: &S3Options) -> Result<Self, RepoError> {
        let variable = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        let region = options.region.clone().or_else(|| variable("AWS_REGION")).unwrap_or_else(|| "us-east-1".to_owned());
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(S3_ATTEMPT_TIMEOUT / 3)
            .operation_attempt_timeout(S3_ATTEMPT_TIMEOUT)
            .operation_timeout(S3_CALL_TIMEOUT)
            .build();
        let mut builder = Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(region))
            .credentials_provider(credentials(options)?)
            .force_path_style(!options.virtual_hosts)
            .retry_config(RetryConfig::standard().with_max_attempts(S3_ATTEMPTS).with_max_backoff(S3_ATTEMPT_TIMEOUT / 8))
            .timeout_config(timeouts)
            // Newer checksums are unknown to many servers; our own are in the objects.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .http_client(http_client(options)?);
        if let Some(endpoint) = &options.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        let prefix = if options.prefix.is_empty() { String::new() } else { format!("{}/", options.prefix) };
        Ok(Self { client: Client::from_conf(builder.build()), bucket: options.bucket.clone(), prefix })
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(crate) async fn create(&self, key: &str, object: Vec<u8>) -> Result<bool, RepoError> {
        let body = bytes::Bytes::from(object);
        for left in (0..S3_ATTEMPTS).rev() {
            let put = self.client.put_object().bucket(&self.bucket).key(self.name(key)).if_none_match("*");
            match put.body(ByteStream::from(body.clone())).send().await {
                Ok(_) => return Ok(true),
                Err(e) if status(&e) == Some(412) => return Ok(false),
                // Another conditional put of the key is under way.
                Err(e) if status(&e) == Some(409) && left > 0 => tokio::time::sleep(rng::jitter(RETRY_BACKOFF_MAX)).await,
                Err(e) => return Err(failed("write", key, e)),
            }
        }
        Err(RepoError::new(RepoErrorKind::Unavailable, "write", key, "others write it all the time"))
    }

    pub(crate) async fn replace(&self, key: &str, object: Vec<u8>) -> Result<(), RepoError> {
        let put = self.client.put_object().bucket(&self.bucket).key(self.name(key)).body(ByteStream::from(object));
        put.send().await.map(drop).map_err(|e| failed("write", key, e))
    }

    pub(crate) async fn get(&self, key: &str, max: usize) -> Result<Vec<u8>, RepoError> {
        // The client retries until the answer begins; a body that ends early is asked for again here.
        let mut attempts = S3_ATTEMPTS;
        loop {
            attempts -= 1;
            match tokio::time::timeout(S3_CALL_TIMEOUT, self.get_once(key, max)).await {
                Ok(Err(e)) if e.verb == BODY && attempts > 0 => tokio::time::sleep(rng::jitter(RETRY_BACKOFF_MAX)).await,
                Ok(result) => return result,
                Err(_) => return Err(RepoError::new(RepoErrorKind::Unavailable, "read", key, "it takes too long")),
            }
        }
    }

    async fn get_once(&self, key: &str, max: usize) -> Result<Vec<u8>, RepoError> {
        let got = self.client.get_object().bucket(&self.bucket).key(self.name(key)).send().await;
        let mut body = got.map_err(|e| failed("read", key, e))?.body;
        let mut object = Vec::new();
        while let Some(part) = body.next().await {
            let cut = |e| RepoError::new(RepoErrorKind::Unavailable, BODY, key, "the answer ended early").because(e);
            let part = part.map_err(cut)?;
            if object.len() + part.len() > max {
                return Err(RepoError::corrupt(key, "it is too long"));
            }
            object.extend_from_slice(&part);
        }
        Ok(object)
    }

    pub(crate) async fn exists(&self, key: &str) -> Result<bool, RepoError> {
        match self.client.head_object().bucket(&self.bucket).key(self.name(key)).send().await {
            Ok(_) => Ok(true),
            Err(e) if status(&e) == Some(404) => Ok(false),
            Err(e) => Err(failed("look for", key, e)),
        }
    }

    pub(crate) async fn list<T>(&self, prefix: &str, keep: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, RepoError> {
        let mut found = Vec::new();
        let mut token = None;
        loop {
            let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(self.name(prefix));
            let page = list.set_continuation_token(token.clone()).send().await.map_err(|e| failed("list", prefix, e))?;
            let keys = page.contents().iter().filter_map(|o| o.key()?.strip_prefix(&self.prefix));
            found.extend(keys.filter_map(&keep));
            let next = page.next_continuation_token().map(str::to_owned);
            if page.is_truncated() != Some(true) {
                return Ok(found);
            }
            if next.is_none() || next == token {
                let why = "the server answers the same page again";
                return Err(RepoError::new(RepoErrorKind::Failure, "list", prefix, why));
            }
            token = next;
        }
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<(), RepoError> {
        match self.client.delete_object().bucket(&self.bucket).key(self.name(key)).send().await {
            Err(e) if code(&e) != Some("NoSuchKey") => Err(failed("delete", key, e)),
            _ => Ok(()),
        }
    }
}

/// The verb of an answer that broke off.
const BODY: &str = "read all of";

fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|r| r.status().as_u16())
}

fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error().and_then(ProvideErrorMetadata::code)
}

/// What a failed request means.
fn failed<E>(verb: &'static str, key: &str, error: SdkError<E, HttpResponse>) -> RepoError
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    use RepoErrorKind as K;
    let (kind, why) = match (code(&error), status(&error)) {
        (Some("NoSuchBucket"), _) => (K::NotFound, "there is no such bucket; make it first"),
        (Some("NoSuchKey"), _) => (K::NotFound, "it does not exist"),
        (Some("QuotaExceeded" | "XMinioStorageFull"), _) | (_, Some(507)) => (K::NoSpace, "the bucket is full"),
        (Some("InvalidAccessKeyId"), _) => (K::Denied, "the server does not know the access key"),
        (Some("SignatureDoesNotMatch"), _) => (K::Denied, "the secret key is wrong"),
        (_, Some(401 | 403)) => (K::Denied, "the server refuses; look at the credentials and the bucket's rights"),
        (_, Some(404)) => (K::NotFound, "it does not exist"),
        (_, Some(429 | 500..=599)) => (K::Unavailable, "the server is overloaded or broken, after all retries"),
        (_, Some(_)) => (K::Failure, "the server refuses"),
        (_, None) => (K::Unavailable, "the server does not answer; look at --endpoint"),
    };
    RepoError::new(kind, verb, key, why).because(error)
}

fn http_client(options: &S3Options) -> Result<aws_sdk_s3::config::SharedHttpClient, RepoError> {
    let tls = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let Some(path) = &options.ca else { return Ok(tls.build_https()) };
    let name = path.display().to_string();
    let pem = std::fs::read(path).map_err(|e| RepoError::file("read certificates", name.clone(), e))?;
    if !pem.windows(27).any(|w| w == b"-----BEGIN CERTIFICATE-----") {
        let why = "there is no certificate in it (PEM is needed)";
        return Err(RepoError::new(RepoErrorKind::Unusable, "read certificates", name, why));
    }
    let store = TrustStore::empty().with_pem_certificate(pem);
    let why = "they cannot be used";
    let context = TlsContext::builder().with_trust_store(store).build();
    let context = context.map_err(|e| RepoError::new(RepoErrorKind::Unusable, "read certificates", name, why).because(e))?;
    Ok(tls.tls_context(context).build_https())
}

fn credentials(options: &S3Options) -> Result<Credentials, RepoError> {
    let variable = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
    let explicit = options.profile.is_some() || options.credentials.is_some();
    if let (false, Some(id), Some(secret)) = (explicit, variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
        return Ok(Credentials::new(id, secret, variable("AWS_SESSION_TOKEN"), None, "environment"));
    }
    let file = options.credentials.clone().or_else(|| variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from));
    let file = file.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".aws/credentials")));
    let file = file.unwrap_or_default();
    let name = file.display().to_string();
    let why = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file";
    let text = std::fs::read_to_string(&file)
        .map_err(|e| RepoError::new(RepoErrorKind::Denied, "read credentials", name.clone(), why).because(e))?;
    let profile = options.profile.clone().or_else(|| variable("AWS_PROFILE")).unwrap_or_else(|| "default".to_owned());
    let why = "the profile is not in it, or lacks aws_access_key_id or aws_secret_access_key";
    profile_keys(&text, &profile).ok_or_else(|| RepoError::new(RepoErrorKind::Denied, "read credentials", name, why))
}

/// The keys of a profile in the text of a credentials file.
fn profile_keys(text: &str, profile: &str) -> Option<Credentials> {
    let mut inside = false;
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim).filter(|l| !l.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            inside = name.trim() == profile;
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            let value = Some(value.trim().to_owned());
            match key.trim() {
                "aws_access_key_id" => id = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(Credentials::new(id?, secret?, token, None, "file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_among_others() {
        let text = "# x\n[default]\naws_access_key_id = a\naws_secret_access_key=b=c\n\n[other]\naws_access_key_id=d\n";
        let keys = profile_keys(text, "default").expect("found");
        assert_eq!((keys.access_key_id(), keys.secret_access_key(), keys.session_token()), ("a", "b=c", None));
        assert!(profile_keys(text, "other").is_none() && profile_keys(text, "none").is_none());
    }
}
