"""Florence-2: captions, boxes, polygons and text from images and task prompts."""
