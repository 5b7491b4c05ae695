//! [`Params`]: the query of a request of Curve's API. Pure.
//!
//! Invariants: of a parameter that is given twice the first counts; one that must be there and is empty counts as missing; parameters that an
//! action does not know are ignored, as Curve does.

use super::code::Code;
use ogee_common::name::VolumePath;

/// Entries of a page unless asked otherwise.
const LIMIT_DEFAULT: usize = 10;

/// The parameters.
#[derive(Debug)]
pub(super) struct Params(pub(super) Vec<(String, String)>);

impl Params {
    /// A parameter as it was given.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that is there and not empty.
    pub(super) fn given(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|value| !value.is_empty())
    }

    /// A parameter that must be there.
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub(super) fn wanted(&self, name: &str) -> Result<&str, Code> {
        self.given(name).ok_or(Code::BadRequest)
    }

    /// A truth, in Curve's spellings.
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub(super) fn flag(&self, name: &str) -> Result<bool, Code> {
        match self.wanted(name)? {
            "true" | "True" | "TRUE" | "1" => Ok(true),
            "false" | "False" | "FALSE" | "0" => Ok(false),
            _ => Err(Code::BadRequest),
        }
    }

    fn number(&self, name: &str, default: usize) -> Result<usize, Code> {
        self.given(name).map_or(Ok(default), |text| text.parse().map_err(|_| Code::BadRequest))
    }

    /// `Offset` and `Limit`.
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub(super) fn page(&self) -> Result<Page, Code> {
        Ok(Page { offset: self.number("Offset", 0)?, limit: self.number("Limit", LIMIT_DEFAULT)? })
    }

    /// Whether a parameter is absent, or has this value.
    pub(super) fn allows(&self, name: &str, value: &str) -> bool {
        self.given(name).is_none_or(|wanted| wanted == value)
    }
}

/// A piece of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page {
    offset: usize,
    limit: usize,
}

impl Page {
    /// Cuts the piece out.
    pub(super) fn of<T>(self, list: Vec<T>) -> Vec<T> {
        list.into_iter().skip(self.offset).take(self.limit).collect()
    }
}

/// The path that a `File` means; `None`: no volume can have it.
pub(super) fn path_of(file: &str) -> Option<String> {
    VolumePath::parse(file).ok().map(|path| path.to_string())
}

/// The `File` of a path.
pub(super) fn file_of(path: &str) -> String {
    format!("/{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_as_curve_reads_them() {
        let params = |list: &[(&str, &str)]| Params(list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect());
        let p = params(&[("User", "a"), ("User", "b"), ("File", ""), ("Lazy", "True"), ("Limit", "2"), ("Offset", "")]);
        assert_eq!((p.wanted("User"), p.wanted("File"), p.flag("Lazy")), (Ok("a"), Err(Code::BadRequest), Ok(true)));
        assert_eq!(p.page(), Ok(Page { offset: 0, limit: 2 }));
        assert_eq!(Page { offset: 1, limit: usize::MAX }.of(vec![1, 2, 3]), [2, 3]);
        assert_eq!(params(&[("Lazy", "yes")]).flag("Lazy"), Err(Code::BadRequest));
        assert_eq!(params(&[("Limit", "-1")]).page(), Err(Code::BadRequest));
        assert!(p.allows("Status", "0") && p.allows("File", "x") && !p.allows("User", "b"));
        assert_eq!(path_of("/a/b").map(|p| file_of(&p)).as_deref(), Some("/a/b"));
        assert_eq!(path_of("//a"), None);
    }
}
