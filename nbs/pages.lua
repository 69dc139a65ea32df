-- What every page needs and Markdown cannot say. Quarto applies it (`filters`), and so does the preview.
-- Pictures load when they come near; tables and displayed formulas scroll in a box that the keyboard reaches.

function Image(image)
  image.attributes.loading = "lazy"
  return image
end

function Table(table)
  return pandoc.Div({table}, pandoc.Attr("", {"scroll"}, {tabindex = "0"}))
end

function Math(math)
  if math.mathtype ~= "DisplayMath" then return nil end
  return pandoc.Span({math}, pandoc.Attr("", {"formula"}, {tabindex = "0"}))
end
